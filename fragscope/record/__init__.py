"""Where requests come from. Importing this package imports torch only when a device is actually used."""
