"""What a change of the code costs: another commit and the working tree, both run on this machine, compared."""
