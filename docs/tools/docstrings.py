"""Docstrings as the pages need them: the few marks of reStructuredText in them become Markdown."""

import re
from typing import Any

from griffe import Alias, Extension, GriffeLoader, Module, NameResolutionError, Object

_ROLE = re.compile(r":(?:class|data|exc|func|meth|mod):`~?([\w.]+)`")
_TABLE = re.compile(r"^( *)=+(?: +=+)+\n(?:.*\n)*?\1=+(?: +=+)+\n(?:.+\n)*\1=+(?: +=+)+$", re.MULTILINE)


class Docstrings(Extension):
    """Rewrites every docstring of the package, once all of it is known."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        """Go through the package."""
        self._rewrite(pkg)

    def _rewrite(self, owner: Object) -> None:
        if owner.docstring:
            owner.docstring.value = as_markdown(owner.docstring.value, owner)
        for member in list(owner.members.values()):
            if not isinstance(member, Alias):
                self._rewrite(member)


def as_markdown(text: str, owner: Object) -> str:
    """Return a docstring with tables, links and blocks of code as Markdown has them."""
    text = _TABLE.sub(lambda table: _table(table[0].splitlines()), text)
    text = re.sub(r"^( *)::$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return _ROLE.sub(lambda role: _link(role[1], owner), text)


def _table(lines: list[str]) -> str:
    """Return a simple table. A line of which only the first column is filled is continued by the next."""
    starts = [ruler.start() for ruler in re.finditer("=+", lines[0])]
    rows: list[list[str]] = []
    unfinished = ""
    for line in lines:
        if line.lstrip().startswith("="):
            continue
        first, *others = (line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True))
        if any(others):
            rows.append([f"{unfinished}{first}", *others])
            unfinished = ""
        else:
            unfinished += f"{first} "
    rows.insert(1, ["---"] * len(starts))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _link(name: str, owner: Object) -> str:
    """Return a link to what this name means where it stands. It must be on some page, or the build fails."""
    if name.startswith("torch."):
        return f"`{name}`"
    path = name
    if not name.startswith("fastwkv."):
        first, _, rest = name.partition(".")
        try:
            path = owner.resolve(first) + (f".{rest}" if rest else "")
        except NameResolutionError:
            path = name  # which no page has
    module = path.removeprefix("fastwkv.").split(".")
    if isinstance(found := _member(owner.package, module), Module) and module[-1] in found.members:
        path += f".{module[-1]}"  # the module and what it is there for have one name: generate, param_groups
    return f"[`{name.removeprefix('fastwkv.')}`][{path}]"


def _member(package: Module, names: list[str]) -> Object | Alias | None:
    try:
        return package[tuple(names)]
    except KeyError:
        return None
