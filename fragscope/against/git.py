"""The repository and the tree of another commit, by way of the installed git. Nothing of the user's is changed.

The other commit is checked out in a worktree of its own in a temporary folder. The repository's hooks do not run for
it, nothing is fetched, and it is gone afterwards, also after an error or an interrupt.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fragscope.errors import NotMeasuredError, UsageError, printable

_GITLINK = "160000"  # the mode of a submodule's entry in a tree (git-ls-tree)
_SHOWN_REFS = 3
_QUIET = {
    "LC_ALL": "C",
    "GIT_OPTIONAL_LOCKS": "0",  # git status would write the index
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_LFS_SKIP_SMUDGE": "1",  # large files would be downloaded
    "GIT_NO_LAZY_FETCH": "1",  # so would what a partial clone lacks
}


@dataclass(frozen=True, slots=True)
class Repository:
    """The repository that is checked out at a folder.

    Attributes:
        top: its root, resolved.
        commit: that is checked out, in full; ``""`` before the first one.
    """

    top: Path
    commit: str

    @classmethod
    def at(cls, folder: Path) -> Repository:
        """The repository that a folder lies in.

        Raises:
            UsageError: there is no git, or no repository.
        """
        top = _ask(folder, "rev-parse", "--show-toplevel")
        if top.returncode or not top.stdout.strip():
            said = _said(top) or "there is no working tree"
            if "dubious ownership" in said:
                raise UsageError(
                    f"--against: git does not trust the repository around {printable(str(folder))}, which belongs to "
                    "another user, as in a container; 'git config --global --add safe.directory FOLDER', with its "
                    "root, says that you do"
                )
            raise UsageError(f"--against needs a git repository, and {printable(str(folder))} is in none ({said})")
        commit = _ask(folder, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        return cls(Path(top.stdout.rstrip("\n")).resolve(), commit.stdout.strip())

    def commit_of(self, ref: str) -> str:
        """The commit that a name means.

        Raises:
            UsageError: nothing of that name is here; names what comes near, and how a shallow clone gets it.
        """
        shown = printable(ref, 100)
        if not ref or ref.startswith("-") or not ref.isprintable():
            raise UsageError(f"--against {shown!r} is no name of a commit; give a branch, a tag or a commit")
        found = _ask(self.top, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        if found.returncode == 0:
            return found.stdout.strip()
        if _ask(self.top, "rev-parse", "--is-shallow-repository").stdout.strip() == "true":
            if "^" in ref or "~" in ref:
                raise UsageError(
                    f"--against {shown}: no such commit is here, since the clone is shallow; 'git fetch --unshallow' "
                    "gets it (actions/checkout: fetch-depth: 2 for HEAD^1, 0 for all)"
                )
            name = ref.removeprefix("origin/")
            raise UsageError(
                f"--against {shown}: no such commit is here, since the clone is shallow; 'git fetch --depth=1 origin "
                f"{printable(name, 100)}' gets it, then give --against FETCH_HEAD (actions/checkout: fetch-depth: 0)"
            )
        refs = _ask(self.top, "for-each-ref", "--format=%(refname:short)").stdout.split()
        near = [r for r in refs if r.endswith(f"/{ref}")] or difflib.get_close_matches(ref, refs, n=_SHOWN_REFS)
        hint = f"did you mean {' or '.join(near[:_SHOWN_REFS])}?" if near else _known(refs)
        raise UsageError(f"--against {shown}: no branch, tag or commit of that name is here; {printable(hint)}")

    def dirty(self, but: Path) -> bool:
        """Whether the working tree differs from what is checked out, new files included.

        Args:
            but: a folder that does not count.
        """
        status = _done(self.top, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all")
        left_out = self.relative(but)
        names = (entry[3:] for entry in status.split("\0") if entry)
        return any(left_out is None or not Path(name).is_relative_to(left_out) for name in names)

    def missing_from_here(self, commit: str) -> int:
        """How many commits lead to ``commit`` that what is checked out does not have; 0 where that cannot be told."""
        count = _ask(self.top, "rev-list", "--count", f"{self.commit}..{commit}") if self.commit else None
        return int(count.stdout) if count is not None and count.returncode == 0 else 0

    def relative(self, path: Path) -> Path | None:
        """A path relative to the root; None for one outside."""
        path = path.resolve()
        return path.relative_to(self.top) if path.is_relative_to(self.top) else None

    def files_below(self, folder: Path) -> list[Path]:
        """Files below a folder that git knows or would add, relative to the root."""
        names = _done(self.top, "ls-files", "-z", "-co", "--exclude-standard", "--", str(folder))
        return [Path(name) for name in sorted(set(names.split("\0"))) if name]

    def other_trees(self) -> list[Path]:
        """The other working trees of this repository."""
        listed = _done(self.top, "worktree", "list", "--porcelain", "-z").split("\0")
        trees = [Path(line.removeprefix("worktree ")).resolve() for line in listed if line.startswith("worktree ")]
        return [tree for tree in trees if tree != self.top]

    @contextlib.contextmanager
    def checked_out(self, commit: str) -> Iterator[Path]:
        """The tree of a commit in a temporary folder that is removed afterwards.

        Raises:
            NotMeasuredError: git cannot check it out, or lacks a commit of a submodule.
        """
        with tempfile.TemporaryDirectory(prefix="fragscope-", ignore_cleanup_errors=True) as made:
            tree = Path(made).resolve() / self.top.name
            try:
                _done(self.top, "-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--detach", str(tree), commit)
                _fill_submodules(self.top, tree, commit)
                yield tree
            finally:
                _remove(self.top, tree)


def _remove(top: Path, tree: Path) -> None:
    """Take a worktree back, from its folder and from the repository's list; also one that was only begun."""
    if _ask(top, "worktree", "remove", "--force", "--force", str(tree)).returncode == 0:
        return
    shutil.rmtree(tree, ignore_errors=True)
    common = _ask(top, "rev-parse", "--path-format=absolute", "--git-common-dir").stdout.rstrip("\n")
    # Not git worktree prune, which would also forget the user's own on a disk that is not mounted now.
    for entry in Path(common, "worktrees").glob("*/gitdir"):
        with contextlib.suppress(OSError):
            if Path(entry.read_text(errors="surrogateescape").strip()).parent == tree:
                shutil.rmtree(entry.parent)


def _fill_submodules(top: Path, tree: Path, commit: str) -> None:
    """Submodules that are there in the user's tree are filled from what git has of them; the others stay empty."""
    for entry in _done(top, "ls-tree", "-r", "-z", commit).split("\0"):
        facts, _, name = entry.partition("\t")
        if not facts.startswith(_GITLINK):
            continue
        wanted, module = facts.split()[2], top / name
        if not (module / ".git").exists():
            continue
        if _ask(module, "cat-file", "-e", f"{wanted}^{{commit}}").returncode:
            raise NotMeasuredError(
                f"the submodule {printable(name)} lacks the commit {wanted[:12]} that is to be compared with; "
                f"'git -C {printable(name)} fetch origin {wanted}' gets it"
            )
        target = tree / name
        target.mkdir(parents=True, exist_ok=True)
        index = {"GIT_INDEX_FILE": str(tree.parent / f"index-{wanted}")}
        _done(module, "read-tree", wanted, extra=index)
        _done(module, "checkout-index", "-a", "-f", f"--prefix={target}/", extra=index)
        _fill_submodules(module, target, wanted)


def _known(refs: list[str]) -> str:
    if not refs:
        return "the repository has no branches yet"
    return f"there are {', '.join(refs[:8])}{', …' if len(refs) > 8 else ''}; 'git fetch' gets others"


@functools.cache
def environment() -> dict[str, str]:
    """The environment without what ties git to one repository, as in hooks, and without anything that asks or waits.

    Configuration in the environment stays: it is the user's, such as which repositories are to be trusted.
    """
    kept = dict(os.environ)
    try:
        names = subprocess.run(["git", "rev-parse", "--local-env-vars"], capture_output=True, text=True, check=False)  # noqa: S607
    except OSError as e:
        raise UsageError(f"--against needs git, which cannot be run: {(e.strerror or str(e)).lower()}") from None
    for name in names.stdout.split():
        if name != "GIT_CONFIG_COUNT":
            kept.pop(name, None)
    return kept


def _ask(folder: Path, *arguments: str, extra: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - arguments of ours; names of commits are checked by git first
        ["git", *arguments],  # noqa: S607
        cwd=folder,
        env=environment() | _QUIET | (extra or {}),
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        stdin=subprocess.DEVNULL,
        check=False,
    )


def _done(folder: Path, *arguments: str, extra: dict[str, str] | None = None) -> str:
    done = _ask(folder, *arguments, extra=extra)
    if done.returncode:
        command = next((a for a in arguments if a.isalpha()), arguments[0])
        raise NotMeasuredError(f"git {command} failed: {_said(done) or f'exit code {done.returncode}'}")
    return done.stdout


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith(("fatal:", "error:"))]
    return printable((fatal or lines or [""])[0].removeprefix("fatal: "), 300)
