"""Parameter trees by path: which leaves train, decay, or learn at another rate."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax

Tree = Any


def paths(tree: Tree) -> list[str]:
    """The path of every leaf, "params/layers/attn/q/w", in the order of jax.tree.leaves."""
    return [join(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def join(path: Sequence[Any]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether one of the shell-style patterns (`*` crosses slashes) covers the whole path, or a parent of it."""
    return any(fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(path, f"{p}/*") for p in patterns)


def check(tree: Tree, patterns: Sequence[str], what: str) -> None:
    """ValueError for a pattern that no path matches: it would be ignored silently."""
    have = paths(tree)
    for pattern in patterns:
        if not any(matches(path, [pattern]) for path in have):
            raise ValueError(f"{what}: {pattern!r} matches no parameter; there are {', '.join(sorted(have)[:40])}")


def split(tree: Tree, patterns: Sequence[str]) -> tuple[Tree, Tree]:
    """(leaves whose path matches, the others): two trees of the same shape with None where the other has the leaf."""
    check(tree, patterns, "trainable")
    pick = lambda wanted: jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if matches(join(path), patterns) == wanted else None, tree
    )
    return pick(True), pick(False)


def merge(a: Tree, b: Tree) -> Tree:
    """The tree that `split` cut."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def decays(path: str) -> bool:
    """Whether weight decay applies: to matrices and adapters, not to norms and biases (transformers' rule)."""
    return path.startswith("adapters/") or path.rsplit("/", 1)[-1] == "w"


def by_path(tree: Tree, rule: Any) -> Tree:
    """The tree with rule(path) at every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: rule(join(path)), tree)
