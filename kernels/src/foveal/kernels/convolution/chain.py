"""Convolutions of networks that only answer: one with its bias and SiLU, and chains of them that are computed in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.kernels.convolution import cpu
from foveal.kernels.convolution.cpu import Place, Step
from foveal.kernels.dispatch import Candidates, choose

if TYPE_CHECKING:
    from jaxtyping import Float

#: Sizes of inputs that a chain keeps the plans of.
_PLANS = 64


class ActivatedConv2d(nn.Conv2d):
    """A convolution, and SiLU where `activated`; on a CPU with oneDNN SiLU is computed inside the convolution."""

    activated = False

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, activated: bool, like: nn.Conv2d) -> ActivatedConv2d:
        """A convolution of these values, with stride, padding and groups of another."""
        with torch.device("meta"):
            made = cls(weight.shape[1] * like.groups, weight.shape[0], like.kernel_size, like.stride, like.padding, groups=like.groups)  # type: ignore[arg-type]
        made.weight, made.bias = nn.Parameter(weight.detach()), None if bias is None else nn.Parameter(bias.detach())
        made.activated = activated
        return made

    def forward(
        self, input: Float[Tensor, "batch inputs height width"], activated: bool = True
    ) -> Float[Tensor, "batch outputs out_height out_width"]:
        """Map to map; without SiLU where `activated` is false."""
        activated = activated and self.activated
        if _fusible(input):
            padding, stride, dilation = (list(map(int, value)) for value in (self.padding, self.stride, self.dilation))
            return torch.ops.mkldnn._convolution_pointwise(
                input, self.weight, self.bias, padding, stride, dilation, self.groups, "swish" if activated else "none", [], ""
            )
        y = super().forward(input)
        return F.silu(y) if activated else y


def _fusible(x: Tensor) -> bool:
    """Whether oneDNN's convolution with its activation can be called: eager inference in single precision on a CPU."""
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise") and not torch.is_grad_enabled()
        and not torch.jit.is_tracing() and not torch.compiler.is_compiling()
    )  # fmt: skip


class ConvolutionChain(nn.Module):
    """Convolutions that feed each other, computed in one call where the processor has 512-bit vectors.

    A chain is written down once: `inputs` gives the places of its inputs, `convolve` adds a convolution and gives the place of its output,
    `leave` says which outputs leave the chain. A place can be cut into channels (`cut`), and several can be read side by side; a map of half the
    size of the others is then read as if doubled (nearest neighbour). On the CPU in float32, without gradients, the whole chain is one C call:
    nothing is joined, doubled or padded in memory, and what stays inside never leaves the cache's reach. Elsewhere its convolutions run one
    by one.

    >>> import torch
    >>> from foveal.kernels.convolution import ActivatedConv2d, ConvolutionChain
    >>> chain = ConvolutionChain(8)
    >>> both = chain.convolve(chain.inputs, ActivatedConv2d(8, 16, 1))
    >>> left, right = chain.cut(both, 8, 8)
    >>> chain.leave(chain.convolve([chain.convolve([left], ActivatedConv2d(8, 8, 3, padding=1)), right], ActivatedConv2d(16, 4, 1)))
    >>> chain(torch.rand(1, 8, 20, 20)).shape
    torch.Size([1, 4, 20, 20])

    The weights are read when the chain first answers: one whose weights have changed since must be made again.

    Args:
        *channels: of the inputs.
    """

    def __init__(self, *channels: int) -> None:
        super().__init__()
        if not channels or min(channels) < 1:
            raise ValueError(f"channels of at least one input are needed; got {channels}")
        self.inputs = [Place(number, 0, count) for number, count in enumerate(channels)]
        self.steps: list[Step] = []
        self.convolutions = nn.ModuleList()
        self.outputs: list[list[int]] = []
        self._packed: list[tuple[Tensor, Tensor | None]] = []
        self._plans: dict[object, cpu.Plan] = {}

    def convolve(
        self, parts: Sequence[Place], convolution: ActivatedConv2d, added: Place | None = None, scale: float = 1.0, early: bool = False
    ) -> Place:
        """Add a convolution to the chain.

        Args:
            parts: what it reads, side by side.
            convolution: with its bias and activation.
            added: a map, or one of half the size, that is added to what comes out.
            scale: of `added`.
            early: whether it is added before the activation.

        Returns:
            The place of its output.

        Raises:
            ValueError: a convolution that is not padded by half its odd kernel, has strides of its own in both directions or a dilation, or reads
                another number of channels.
        """
        kernel = (convolution.kernel_size[0], convolution.kernel_size[1])
        plain = tuple(convolution.padding) == (kernel[0] // 2, kernel[1] // 2) and kernel[0] % 2 == kernel[1] % 2 == 1
        if (
            not plain
            or convolution.stride[0] != convolution.stride[1]
            or tuple(convolution.dilation) != (1, 1)
            or convolution.padding_mode != "zeros"
        ):
            raise ValueError(f"a convolution of a chain has an odd kernel, zeros of half of it around, one stride and no dilation; got {convolution}")
        read = sum(place.channels for place in parts)
        if read != convolution.in_channels or len(parts) > cpu.PARTS or (added and added.channels != convolution.out_channels):
            raise ValueError(
                f"{convolution} reads up to {cpu.PARTS} maps of {convolution.in_channels} channels together, and adds one of "
                f"{convolution.out_channels}; got {[place.channels for place in parts]} and {None if added is None else added.channels}"
            )
        stride, groups = convolution.stride[0], convolution.groups
        self.steps.append(Step(tuple(parts), added, convolution.out_channels, kernel, stride, groups, convolution.activated, scale, early))
        self.convolutions.append(convolution)
        return Place(len(self.inputs) + len(self.steps) - 1, 0, convolution.out_channels)

    @staticmethod
    def cut(place: Place, *channels: int) -> list[Place]:
        """Slices of so many channels, one after the other."""
        if sum(channels) != place.channels:
            raise ValueError(f"channels of the slices add up to the {place.channels} that are there; got {channels}")
        starts = [place.first + sum(channels[:number]) for number in range(len(channels))]
        return [Place(place.value, start, count) for start, count in zip(starts, channels, strict=True)]

    def leave(self, *places: Place | Sequence[Place]) -> None:
        """Say which outputs of convolutions the chain gives, whole; several in a list leave as one map, side by side.

        Raises:
            ValueError: an input, or a slice.
        """
        groups = [[place] if isinstance(place, Place) else list(place) for place in places]
        for place in (place for group in groups for place in group):
            number = place.value - len(self.inputs)
            if number < 0 or place != Place(place.value, 0, self.steps[number].outputs):
                raise ValueError(f"a whole output of a convolution can leave a chain; got {place}")
        self.outputs = [[place.value for place in group] for group in groups]

    def candidates(self, *inputs: Tensor) -> Candidates:
        """Backends in order of preference, each with the reason why it cannot take these inputs."""
        reason: str | None = None
        if any(x.device.type != "cpu" for x in inputs):
            reason = f"it needs tensors on the CPU, these are on {inputs[0].device.type}"
        elif any(x.dtype != torch.float32 for x in inputs) or self.convolutions[0].weight.dtype != torch.float32:
            reason = f"it is float32 only; got {inputs[0].dtype}"
        elif torch.is_grad_enabled() and any(value.requires_grad for value in (*inputs, *self.parameters())):
            reason = "it gives no gradients"
        elif torch.jit.is_tracing() or torch.compiler.is_compiling() or any(type(x) is not Tensor for x in inputs):
            reason = "tracers and compilers know plain operators only"
        elif torch.is_autocast_enabled("cpu"):
            reason = "autocast asks for another precision"
        elif any(0 in x.shape for x in inputs):
            reason = "there is nothing to compute"
        elif cpu.library() is None:
            reason = "no compiled C library, or a processor without 512-bit vectors"
        return [("cpu", reason), ("torch", None)]

    def forward(self, *inputs: Float[Tensor, "batch channels height width"], backend: str | None = None) -> Tensor | tuple[Tensor, ...]:
        """Maps to maps: one tensor where one leaves the chain, a tuple where several do.

        Raises:
            ValueError: other channels than the chain was written for, or a backend that cannot run the call.
        """
        if len(inputs) != len(self.inputs) or any(x.dim() != 4 or x.shape[1] != place.channels for x, place in zip(inputs, self.inputs, strict=True)):
            raise ValueError(f"inputs must have {[place.channels for place in self.inputs]} channels; got {[tuple(x.shape) for x in inputs]}")
        if choose("ConvolutionChain", self.candidates(*inputs), backend) == "torch":
            found = self._one_by_one(inputs)
        else:
            found = [x.permute(0, 3, 1, 2) for x in self._at_once(inputs)]
        return found[0] if len(found) == 1 else tuple(found)

    def _at_once(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        given = [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last) for x in inputs]
        threads = torch.get_num_threads()
        key = (threads, *((x.shape, x.stride()) for x in given))
        plan = self._plans.get(key)
        if plan is None:
            self._check_sizes(given)
            if not self._packed:
                with torch.inference_mode(False):
                    self._packed = [_packed(*both) for both in zip(self.convolutions, self.steps, strict=True)]
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = cpu.plan(given, self.steps, self.outputs, self._packed, threads)
        return cpu.run(plan, given, threads)

    def _one_by_one(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        maps = list(inputs)
        for step, convolution in zip(self.steps, self.convolutions, strict=True):
            parts = [maps[place.value].narrow(1, place.first, place.channels) for place in step.parts]
            y = convolution.forward(join(*parts), activated=False) if step.early else convolution(join(*parts))
            if step.added is not None:
                added = maps[step.added.value].narrow(1, step.added.first, step.added.channels)
                y = torch.add(y, added if added.shape == y.shape else F.interpolate(added, scale_factor=2.0), alpha=step.scale)
            maps.append(F.silu(y) if step.early and step.activated else y)
        return [maps[group[0]] if len(group) == 1 else torch.cat([maps[number] for number in group], 1) for group in self.outputs]

    def _check_sizes(self, inputs: Sequence[Tensor]) -> None:
        """That every step reads maps of one size, or half of it, and adds one of its own."""
        sizes = [(x.shape[2], x.shape[3]) for x in inputs]
        if len({x.shape[0] for x in inputs}) > 1:
            raise ValueError(f"inputs must have one batch; got {[tuple(x.shape) for x in inputs]}")
        for step in self.steps:
            read = [sizes[place.value] for place in step.parts]
            largest = (max(height for height, _ in read), max(width for _, width in read))
            out = ((largest[0] - 1) // step.stride + 1, (largest[1] - 1) // step.stride + 1)
            wrong = any(size not in (largest, (largest[0] / 2, largest[1] / 2)) for size in read)
            if wrong or (step.added and sizes[step.added.value] not in (out, (out[0] / 2, out[1] / 2))):
                raise ValueError(f"maps side by side must have one size, or half of it, and what is added the output's; got {read}, added to {out}")
            sizes.append(out)

    def _forget(self) -> None:
        self._packed, self._plans = [], {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget()  # plans hold addresses of the weights
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": [], "_plans": {}}


def _packed(convolution: Any, step: Step) -> tuple[Tensor, Tensor | None]:
    bias = convolution.bias
    return cpu.pack(convolution.weight, convolution.groups, cpu.kind(step)), None if bias is None else bias.detach().clone()


def join(*maps: Tensor) -> Tensor:
    """Maps side by side in their channels; one of half the size of the largest is doubled (nearest neighbour)."""
    if len(maps) == 1:
        return maps[0]
    height = max(x.shape[2] for x in maps)
    return torch.cat([x if x.shape[2] == height else F.interpolate(x, scale_factor=2.0) for x in maps], 1)
