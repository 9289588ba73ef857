"""Every name of upstream that a patch file reads is declared by one of its patches: see ``uses`` of ``Patch``.

Objects of upstream have one of a few names in these files. What is read of them must be declared; what is read of
anything else must be a public name of Python, torch or this package.
"""

from __future__ import annotations

import ast
import builtins
import collections.abc
import contextlib
import dataclasses
import functools
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import hf_packfix.engine.patch
import hf_packfix.engine.probe
import hf_packfix.evaluation
import hf_packfix.packing
import hf_packfix.patches
import hf_packfix.rnn
from hf_packfix.engine.patch import Patch
from hf_packfix.patches import FAST_RNN, PATCHES

FILES = sorted(path for path in Path(hf_packfix.patches.__file__).parent.glob("*.py") if path.name != "__init__.py")

#: The names of upstream's objects.
OBJECTS = {"self", "trainer", "model", "arguments", "container", "smoother"}

#: What is public elsewhere.
_PUBLIC = [torch, torch.Tensor, PackedSequence, torch.nn.Module, torch.nn.functional, Patch, *vars(builtins).values()]
_PUBLIC += [ast, contextlib, dataclasses, functools, inspect, inspect.Parameter, sys, types, collections.abc.Mapping]
_PUBLIC += [hf_packfix.packing, hf_packfix.evaluation, hf_packfix.evaluation.Loop, hf_packfix.engine.probe]
_PUBLIC += [hf_packfix.rnn]
PUBLIC = {
    name
    for owner in _PUBLIC
    for name in dir(owner)
    if not (isinstance(owner, type) and issubclass(owner, BaseException))
} | {"module"}

#: Methods of our own models, which others may have as well.
OURS = {"labels_in_loss", "prepare_decoder_input_ids_from_labels"}


def of_file(path: Path) -> list[Patch]:
    return [patch for patch in PATCHES + FAST_RNN if path.stem == patch.module.replace(".", "_")]


def declared(path: Path) -> set[str]:
    """Return the names that the patches of a file declare, with those of all targets."""
    names = [patch.path for patch in PATCHES]
    names += [use.rpartition(":")[2] for patch in of_file(path) for use in patch.uses]
    return {part for name in names for part in name.split(".")}


def root(node: ast.AST) -> str:
    """Return the name that a chain of attributes, calls and subscripts begins with."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def read(path: Path) -> list[tuple[str, str]]:
    """Return every name that a file reads of an object, with the name of the object."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # Probes make stand-ins of upstream's objects; one that fails lets the patch be applied.
    probes = {
        word.value.id
        for word in ast.walk(tree)
        if isinstance(word, ast.keyword) and word.arg == "upstream_supports" and isinstance(word.value, ast.Name)
    }
    found, waiting = [], [node for node in tree.body if getattr(node, "name", None) not in probes]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.keyword) and node.arg == "upstream_supports":
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Attribute):
            found.append((root(node), node.attr))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            found += [(root(node.args[0]), word.value) for word in node.args[1:2] if isinstance(word, ast.Constant)]
        elif isinstance(node, ast.Call) and root(node.func) == "original":
            found += [("a call of the original", word.arg) for word in node.keywords if word.arg]
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("transformers", "accelerate"):
            found += [("self", alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_patch_file_reads_nothing_of_upstream_that_it_does_not_declare(path):
    names = declared(path)
    keywords = {name for patch in of_file(path) for name in patch.parameters}
    own = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    for owner, name in read(path):
        if name.startswith(("__", "_hf_packfix")):
            continue
        if owner == "a call of the original":
            assert name in keywords, f"{path.name}: the original gets {name}=, which is no declared parameter"
        elif owner in OBJECTS:
            allowed = names | OURS | (set(dir(torch.nn.Module)) if owner == "model" else set())
            assert name in allowed, f"{path.name} reads {name} of {owner}: declare it in uses="
        else:
            assert name in PUBLIC | names | own, f"{path.name} reads {name} of {owner or 'a value'}: declare it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_patch_file_declares_nothing_that_it_does_not_read(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # What a stand-in for an object of upstream is given counts as well.
    names = {name for _, name in read(path)} | {word.arg for word in ast.walk(tree) if isinstance(word, ast.keyword)}
    for patch in of_file(path):
        for use in patch.uses:
            assert use.rpartition(":")[2].rpartition(".")[2] in names, f"{patch.target} uses {use}"
