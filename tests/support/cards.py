"""A card that is not there: tensors that say they lie on one, and are computed on the CPU.

What a card would refuse is refused: a product of tensors of two devices, an index that lies elsewhere than what it chooses
from, and, while passes are recorded, everything that waits for the device. So it shows, without a card, that tensors are made
where they are used. What kernels compute there is not its business.
"""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CARD = torch.device("cuda", 0)
COPIES = {"copy_", "_to_copy", "set_"}
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "unique_consecutive",
    "_unique2",
    "unique",
    "item",
}
"""Operations that a recording cannot hold: the host reads what the device computes."""
READING = {"tolist", "item", "__int__", "__float__", "__bool__", "__index__", "__contains__"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
waits: list[str] = []
"""Names of the operations that waited for the device."""
is_recording = False


class OnCard(torch.Tensor):
    """`held`: on the CPU, what it is."""

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=CARD,
            requires_grad=requires_grad,
        )

    def __init__(self, held, requires_grad=False):
        self.held = held

    def __repr__(self):
        return f"OnCard({self.held})"

    def __deepcopy__(self, memo):
        made = OnCard(self.held.clone())
        made._is_param = isinstance(self, torch.nn.Parameter)
        return made

    def data_ptr(self):
        return self.held.data_ptr()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function._schema.name.split("::")[1]
        given, to = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)], kwargs.get("device")
        refuse_two_devices(name, args, given)
        if name in WAITING or (name in COPIES and leaves_or_enters(name, args, to)):
            wait(name)
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        found = function(*tree_map(on_host, args), **tree_map(on_host, kwargs))
        if name.endswith("_") and not name.endswith("__"):  # in place
            return args[0]
        if to is not None and torch.device(to).type == "cpu":
            return found
        return tree_map(on_card, found)


def on_host(x):
    return x.held if isinstance(x, OnCard) else x


def on_card(x):
    return OnCard(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnCard) else x


def is_number(x):
    return x.ndim == 0 and not isinstance(x, OnCard)


def refuse_two_devices(name, args, given):
    if name in COPIES:
        return
    if name in INDEXING:  # places on the CPU are taken along
        given = [x for x in (args[0], *args[2:3]) if isinstance(x, torch.Tensor)]
        if any(isinstance(x, OnCard) for x in tree_flatten(args[1])[0]) and not isinstance(args[0], OnCard):
            raise RuntimeError(f"{name}: indices on the card of a tensor on the CPU")
    if len({isinstance(x, OnCard) for x in given if not is_number(x)}) > 1:
        raise RuntimeError(f"{name}: tensors on two devices, {[(type(x).__name__, tuple(x.shape)) for x in given]}")


def leaves_or_enters(name, args, to):
    if name == "copy_":
        return isinstance(args[0], OnCard) != isinstance(args[1], OnCard)
    return to is not None and torch.device(to).type == "cpu"


def wait(name):
    if is_recording:
        raise RuntimeError(f"{name} waits for the device inside a recording")
    waits.append(name)


def called(function, args, kwargs):
    """A function of torch's: those that ask for a card make tensors on it."""
    name = getattr(function, "__name__", "")
    if name == "_has_compatible_shallow_copy_type":
        return False
    if name == "__invert__" and isinstance(args[0], OnCard):
        return args[0].bitwise_not()
    if name in READING and isinstance(args[0], OnCard):
        wait(name)
        return function(args[0].held)
    if name in ("__getitem__", "__setitem__") and any(isinstance(x, OnCard) for x in tree_flatten(args)[0]):
        return at(name, *args)
    if name == "scaled_dot_product_attention" and isinstance(args[0], OnCard):
        refuse_two_devices(name, args, [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)])
        return on_card(function(*map(on_host, args), **{key: on_host(value) for key, value in kwargs.items()}))
    if name == "to" and len(args) > 1 and isinstance(args[1], OnCard):
        args = (args[0], CARD, args[1].dtype)
    kwargs.pop("pin_memory", None)
    moved = [isinstance(x, torch.device | str) and str(x).startswith("cuda") for x in args]
    asked = kwargs.get("device")
    is_asked = asked is not None and torch.device(asked).type == "cuda"
    if (name == "to" and any(moved)) or name == "cuda":
        rest = [x for x, is_device in zip(args, moved, strict=True) if not is_device]
        return entered(rest, kwargs)
    if is_asked:
        if name == "to":
            return entered(args, {key: value for key, value in kwargs.items() if key != "device"})
        return on_card(function(*map(on_host, args), **{**kwargs, "device": "cpu"}))
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:  # torch's way into it asks for a card first
        if not any(said in str(error) for said in ("not linked with support for cuda", "from the 'CUDA' backend")):
            raise
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    refuse_two_devices(name, args, given)
    if name in WAITING or (name == "copy_" and leaves_or_enters(name, args, None)):
        wait(name)
    found = function(*tree_map(on_host, args), **tree_map(on_host, kwargs))
    return args[0] if name.endswith("_") and not name.endswith("__") else tree_map(on_card, found)


def at(name, x, index, *value):
    """x[index], or x[index] = value: by slices and numbers, or by tensors of places, or by what is true."""
    tensors = [part for part in tree_flatten(index)[0] if isinstance(part, torch.Tensor)]
    if not isinstance(x, OnCard) and (tensors or any(isinstance(given, OnCard) for given in value)):
        if any(isinstance(part, OnCard) for part in tensors):
            raise RuntimeError(f"{name}: indices on the card of a tensor on the CPU")
        wait(name)
    if any(part.dtype == torch.bool for part in tensors):
        wait(name)
    for given in value:
        if isinstance(given, torch.Tensor) and isinstance(x, OnCard) and not isinstance(given, OnCard):
            if tensors and not is_number(given):
                raise RuntimeError(f"{name}: tensors on two devices")
            wait(name)
    found = getattr(on_host(x), name)(tree_map(on_host, index), *map(on_host, value))
    return on_card(found) if isinstance(x, OnCard) else found


def entered(args, kwargs):
    """`Tensor.to` a card: number format and device."""
    x, *rest = args
    if not isinstance(x, OnCard) and is_recording:
        raise RuntimeError("a tensor is brought to the card inside a recording")
    kwargs = {key: value for key, value in kwargs.items() if key != "non_blocking"}
    rest = [value for value in rest if not isinstance(value, bool)]
    if rest and rest[0] is None:
        rest = rest[1:]
    result = x if not rest and not kwargs else torch.Tensor.to(x, *rest, **kwargs)
    if isinstance(x, torch.nn.Parameter) and isinstance(result, torch.Tensor):
        result = result.detach()
    return on_card(result.clone() if result is x and not isinstance(x, OnCard) else result)


class _Made(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return called(function, args, dict(kwargs or {}))


@contextlib.contextmanager
def a_card():
    """A card is there, as far as tensors can tell; waiting for it takes no time."""
    waits.clear()
    no_wait = mock.patch.multiple(torch.cuda, synchronize=lambda *_: None, Event=mock.Mock)
    as_without = mock.patch.object(torch, "inference_mode", no_gradients)  # under which a wrapper cannot be viewed
    with no_wait, as_without, _Made():
        yield waits


def no_gradients(mode=True):
    return torch.no_grad() if mode else contextlib.nullcontext()


def record(step):
    """In the place of a recorder: a recording that refuses what a CUDA graph would."""
    global is_recording
    step()
    is_recording = True
    try:
        step()
    finally:
        is_recording = False
    return step
