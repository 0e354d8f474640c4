"""The pickle inside a PyTorch file, read by a small machine that can make containers and descriptions of tensors.

Python's own unpickler calls whatever the pickle names, and even with `find_class` restricted a damaged one can ask it
for any amount of memory. This one knows the opcodes that torch.save writes (protocols 2 to 5), and of the names in
`GLOBALS` calls those that make a tensor or an OrderedDict; whatever else a pickle asks for is a ValueError naming it.
"""

import dataclasses
import math
import pickletools
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("bool"),
}
_DICT, _TENSOR, _PARAMETER = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)
GLOBALS = frozenset({_DICT, _TENSOR, _PARAMETER, *(f"torch.{name}" for name in STORAGES)})


@dataclasses.dataclass(frozen=True)
class Storage:
    """A file's record of `count` numbers, over which tensors are laid."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage: its element [i, j, ...] is number `offset` + i * strides[0] + j * strides[1] + ..."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


def unpickle(raw: bytes) -> Any:
    """What the pickle holds: dicts, lists, tuples, numbers, strings and `Tensor`s. ValueError for anything else."""
    machine = _Machine()
    for opcode, argument in _operations(raw):
        if opcode == "STOP":
            return machine.pop()
        machine.step(opcode, argument)
    raise ValueError("the pickle does not end")


def _operations(raw: bytes) -> Iterator[tuple[str, Any]]:
    try:
        yield from ((opcode.name, argument) for opcode, argument, _ in pickletools.genops(raw))
    except ValueError as problem:
        raise ValueError(f"the pickle is damaged: {problem}") from None


_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(  # the argument is the value
    ["BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"]
)
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = frozenset({"BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GETS = frozenset({"BINGET", "LONG_BINGET"})


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _VALUES:
            self.stack.append(_VALUES[opcode])
        elif opcode in _EMPTY:
            self.stack.append(_EMPTY[opcode]())
        elif opcode in _PUTS:
            self.memo[len(self.memo) if argument is None else argument] = self.top()
        elif opcode in _GETS:
            if argument not in self.memo:
                raise ValueError(f"the pickle asks for memo {argument}, which it has not put there")
            self.stack.append(self.memo[argument])
        elif opcode in _TUPLES:
            self.stack.append(tuple(self.pops(_TUPLES[opcode])))
        elif handler := _HANDLERS.get(opcode):
            handler(self, argument)
        elif opcode not in ("PROTO", "FRAME"):
            raise ValueError(f"the pickle has the opcode {opcode}, which no file of tensors needs")

    def top(self) -> Any:
        if not self.stack:
            raise ValueError("the pickle takes from an empty stack")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def pops(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def mark(self, _) -> None:
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("the pickle takes from a mark that it has not set")
        at = self.marks.pop()
        taken, self.stack[at:] = self.stack[at:], []
        return taken

    def tuple(self, _) -> None:
        self.stack.append(tuple(self.since_mark()))

    def append(self, _) -> None:
        self.extend(self.pops(1))

    def appends(self, _) -> None:
        self.extend(self.since_mark())

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.top(), list):
            raise ValueError(f"the pickle appends to {_kind(self.top())}")
        self.top().extend(items)

    def set_item(self, _) -> None:
        self.update(self.pops(2))

    def set_items(self, _) -> None:
        self.update(self.since_mark())

    def update(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"the pickle sets items of {_kind(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | None):
                raise ValueError(f"the pickle has {_kind(key)} for the key of a dict")
            if key in target:
                raise ValueError(f"the pickle has the key {_kind(key)} twice")
            target[key] = value

    def global_(self, name: str) -> None:
        self.find(*name.split(" ", 1))

    def stack_global(self, _) -> None:
        self.find(*self.pops(2))

    def find(self, *parts: Any) -> None:
        wanted = ".".join(part if isinstance(part, str) else _kind(part) for part in parts)
        if wanted not in GLOBALS:
            raise ValueError(f"the pickle asks for {wanted[:120]!r}, which is no part of a tensor: it is not loaded")
        self.stack.append(_Global(wanted))

    def reduce(self, _) -> None:
        function, arguments = self.pops(2)
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError(f"the pickle calls {_kind(function)}")
        if function.name == _DICT and not arguments:
            self.stack.append({})
        elif function.name == _TENSOR:
            self.stack.append(_tensor(arguments))
        elif function.name == _PARAMETER and arguments and isinstance(arguments[0], Tensor):
            self.stack.append(arguments[0])
        else:
            raise ValueError(
                f"the pickle calls {function.name} with {', '.join(map(_kind, arguments[:8])) or 'nothing'}"
            )

    def build(self, _) -> None:
        # Of an OrderedDict: the attribute `_metadata` of a module's state, which says nothing about tensors.
        target, state = self.pops(2)
        if not isinstance(target, dict) or not isinstance(state, dict):
            raise ValueError(f"the pickle sets the state of {_kind(target)}")
        self.stack.append(target)

    def persistent(self, _) -> None:
        match self.pop():
            case ("storage", _Global(name), str(key), str(), int(count)) if not isinstance(count, bool) and count >= 0:
                dtype = STORAGES.get(name.removeprefix("torch."))
                if dtype is not None:
                    self.stack.append(Storage(key, dtype, count))
                    return
        raise ValueError("the pickle refers to something that is not a storage")


_HANDLERS = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None)."""
    if not 6 <= len(arguments) <= 7 or not isinstance(arguments[0], Storage):
        raise ValueError(f"a tensor is made of {', '.join(map(_kind, arguments[:8])) or 'nothing'}")
    storage, offset, shape, strides = arguments[:4]
    if not _sizes((offset,)) or not _sizes(shape) or not _sizes(strides) or len(shape) != len(strides):
        raise ValueError("a tensor's offset, shape or strides are not numbers of elements")
    if arguments[6:] and arguments[6]:
        raise ValueError("a tensor is marked as conjugated or negated, which is not supported")
    # numpy refuses more than 2**63 bytes even when a size is 0.
    if len(shape) > 32 or math.prod(max(n, 1) for n in shape) >= 2**59:
        raise ValueError(f"a tensor's {shape=} is impossibly large")
    reach = 0  # of the axes with smaller strides: those must end before the next stride does, or elements overlap
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reach:
            raise ValueError(f"the elements of a tensor with {shape=} and {strides=} overlap: save a contiguous copy")
        reach += stride * (size - 1)
    last = offset + reach + 1 if math.prod(shape) else offset
    if last > storage.count:
        raise ValueError(
            f"a tensor with {shape=}, {strides=} from element {offset} on ends at element {last} of storage "
            f"{storage.key!r}, which has {storage.count}"
        )
    return Tensor(storage, offset, shape, strides)


def _sizes(values: Any) -> bool:
    # type() rather than isinstance: true is no size
    return isinstance(values, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _kind(value: Any) -> str:
    """What to call a value in an error. Containers are not spelt out: a small pickle can hold endless ones."""
    if isinstance(value, _Global):
        return value.name
    shown = isinstance(value, str | bool | float) or value is None or (isinstance(value, int) and abs(value) < 2**63)
    return repr(value[:40] if isinstance(value, str) else value) if shown else f"a {type(value).__name__}"


def names(value: dict[Any, Any]) -> Sequence[str]:
    """The names in a dict that holds tensors under names alone; ValueError, naming the first that is something else."""
    for key, one in value.items():
        if not isinstance(key, str) or not isinstance(one, Tensor):
            raise ValueError(f"{_kind(key)} is {_kind(one)}; expected tensors under their names, and nothing else")
    return list(value)
