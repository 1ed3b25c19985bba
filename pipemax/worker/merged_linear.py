"""Linear layers that are given the same input share one GEMM, whatever the family and its forward.

q, k and v of an attention module, or gate and up of an MLP, stay modules of their own, under their names. Whichever is
called first computes the outputs of all, and each of the others hands out its part when it is called with that tensor:

    q_proj(x)   one GEMM [x q k v]; gives q, k and v wait
    k_proj(x)   gives k
    v_proj(x)   gives v: nothing waits any more, x is let go
    k_proj(y)   not what was kept: a GEMM of its own

What nobody fetched is dropped when the next group computes, or at the end of the step (`MergedLinears.end_step`), and
that group shares no more: its members do not get one input. At most one group's outputs wait, and none between steps.

That tensor is known by identity, and by its version where tensors have one: those of inference mode have none, so a
forward that wrote into the input between two members' calls would be served wrongly there. None is known that does.

The members' weights are views of the merged one, so nothing is held twice. They must stay where they are: moving the
modules to another device or dtype would part them from what is computed with.

Never here: forwards of our own (`llama_layers.py`), the experts of a mixture (Transformers has one GEMM for those).

Shape letters: T tokens (any leading shape), I inputs, O outputs of one member, or of all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Members of one group, by their names in the module that holds them.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def merge_weights(members: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight [O, I] and bias [O] that give the members' outputs side by side; theirs become views of these.

    The bias is None where no member has one; a member without one gets none.
    """
    weight = torch.cat([member.weight for member in members])
    biases: list[Tensor | None] = [member.bias for member in members]
    bias = None
    if any(own is not None for own in biases):
        bias = torch.cat([weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in members])
    first = 0
    for member in members:
        end = first + len(member.weight)
        member.weight = nn.Parameter(weight[first:end], requires_grad=False)
        if bias is not None and member.bias is not None:
            member.bias = nn.Parameter(bias[first:end], requires_grad=False)
        first = end
    return weight, bias


@dataclass(slots=True, eq=False)
class _Group:
    """`sizes`: the members' numbers of outputs. `shares`: whether members are still taken to get one input."""

    weight: Tensor
    bias: Tensor | None
    sizes: list[int]
    shares: bool = True


@dataclass(slots=True, eq=False)
class _Waiting:
    """Outputs [T, O] of the members that were not called yet, by their places in the group, and what they are of."""

    group: _Group
    input: Tensor
    version: int | None
    outputs: dict[int, Tensor]


class _Shelf:
    """Where outputs wait; one for all groups of a stage, since a layer calls the members of a group in a row."""

    def __init__(self) -> None:
        self._waiting: _Waiting | None = None

    def take(self, group: _Group, place: int, input_: Tensor) -> Tensor | None:
        """The output of a member of `group` for `input_`; None where it does not wait here."""
        waiting = self._waiting
        if waiting is None or waiting.group is not group or waiting.input is not input_:
            return None
        if waiting.version != _version(input_):
            return None
        output = waiting.outputs.pop(place, None)
        if not waiting.outputs:
            self._waiting = None
        return output

    def put(self, waiting: _Waiting) -> None:
        self.clear()
        self._waiting = waiting

    def clear(self) -> None:
        """Drops what waits. It was computed for nothing: its group shares no more."""
        if self._waiting is not None:
            self._waiting.group.shares = False
            self._waiting = None


class MemberLinear(nn.Linear):
    """A linear layer of a group. Inputs and outputs as `nn.Linear`; outputs may be views, with gaps between rows."""

    def __init__(self, plain: nn.Linear, *, group: _Group, place: int, shelf: _Shelf) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make new weights
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = plain.weight
        self.register_parameter("bias", plain.bias)
        self.train(plain.training)
        self._group = group
        self._place = place
        self._shelf = shelf

    def forward(self, input: Tensor) -> Tensor:
        group = self._group
        if not group.shares:
            return linear(input, self.weight, self.bias)
        output = self._shelf.take(group, self._place, input)
        if output is not None:
            return output
        outputs = dict(enumerate(linear(input, group.weight, group.bias).split_with_sizes(group.sizes, dim=-1)))
        own = outputs.pop(self._place)
        self._shelf.put(_Waiting(group, input, _version(input), outputs))
        return own


class MergedLinears:
    """The groups of one stage. Make one with `of`; calls must come from one thread at a time."""

    def __init__(self) -> None:
        self._shelf = _Shelf()
        self._groups: list[_Group] = []

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Sequence[nn.Module]) -> MergedLinears:
        """Merges what `layers` have of groups, in place and one layer at a time; their weights are loaded.

        Left alone: what is not a plain `nn.Linear` in float32, bfloat16 or float16 (quantised, hooked, replaced), and
        weights that another module of the layers holds too.
        """
        merged = cls()
        holders = Counter(
            id(parameter) for layer in layers for _, parameter in layer.named_parameters(remove_duplicate=False)
        )
        for layer in layers:
            for parent, members in list(_groups_in(layer, holders)):
                merged._merge(parent, members)
            if any(parameter.is_cuda for parameter in layer.parameters()):
                torch.cuda.empty_cache()  # the members' memory is of no size that a later layer asks for
        return merged

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    @property
    def num_sharing(self) -> int:
        """Groups whose members have got one input each time so far."""
        return sum(group.shares for group in self._groups)

    def end_step(self) -> None:
        """Lets go of what the step's layers did not fetch."""
        self._shelf.clear()

    def _merge(self, parent: nn.Module, members: dict[str, nn.Linear]) -> None:
        weight, bias = merge_weights(list(members.values()))
        group = _Group(weight, bias, [member.out_features for member in members.values()])
        for place, (name, member) in enumerate(members.items()):
            setattr(parent, name, MemberLinear(member, group=group, place=place, shelf=self._shelf))
        self._groups.append(group)


def _groups_in(layer: nn.Module, holders: Counter[int]) -> Iterator[tuple[nn.Module, dict[str, nn.Linear]]]:
    """Modules, and those of their members that can be merged, by name."""
    for parent in layer.modules():
        children = dict(parent.named_children())
        for names in _SIBLINGS:
            members = {name: child for name in names if _is_plain(child := children.get(name), holders)}
            kinds = {(m.in_features, m.weight.dtype, m.weight.device) for m in members.values()}
            if len(members) > 1 and len(kinds) == 1:
                yield parent, members


def _is_plain(module: nn.Module | None, holders: Counter[int]) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer that computes what its own weights say, and nothing else."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    return (
        type(weight) is nn.Parameter  # a quantised one is of a type of its own
        and weight.dtype in _DTYPES
        and all(p.dtype is weight.dtype and holders[id(p)] == 1 for p in parameters.values())
    )


def _version(tensor: Tensor) -> int | None:
    """Changes when the tensor is written in place; tensors made in inference mode do not count that."""
    return None if tensor.is_inference() else tensor._version
