"""CLME-CondConv of A-SDM (arXiv:2312.15516), as rebuilt here: convolutions that reuse removed kernels.

Pruning a layer discards the kernels of its convolutions. Here they become experts of the convolution of a
remaining layer, which mixes them for every image. The paper's code and routing are not public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Up to this number of positions, one convolution with all experts is cheaper than mixing a kernel for every
# image, because mixing reads and writes the complete kernel.
FEW_POSITIONS = 64


class CLMECondConv2d(nn.Module):
    """Cross-layer multi-expert conditional convolution: a kernel W(x) = Σ α_i(x) W_i for every image.

    Expert 0 is the kept convolution; the others come from removed layers. Biases are mixed like kernels. The
    weights are α(x) = (1, 0, …, 0) + FC(mean of x over positions), where FC starts at zero, so that at step 0
    the layer equals the kept convolution. CondConv (Yang et al., NeurIPS 2019, arXiv:1904.04971) uses α =
    sigmoid(FC(…)), which is ½ for every expert if FC is zero and would lose the function of the pruned
    network.

    With α = (1, 0, …) the kernel equals W_0 exactly. A batch runs as one grouped convolution with one group
    per image or, for few positions, as the convolutions of all experts, whose outputs are mixed. Both may sum
    in another order than a plain convolution, so float32 results can differ by rounding (10⁻⁶ of their
    magnitude). A single image runs as a plain convolution. So does a batch whose images all have the same
    kernel, if it is on the CPU and no gradient is required. At step 0, these cases equal the kept convolution
    bit for bit. On a GPU, comparing the kernels would force a synchronization in every layer; use `fold`
    first where exact equality matters.

    The experts need memory, and mixing takes E·out·in·k² multiplications per image. Compared with the
    unpruned network, this saves layers but not parameters. `fold` makes a plain convolution if the routing is
    constant.

    Args:
        conv: provides shape, stride, padding, dilation, device and dtype. Its weights are not copied, see
            `from_convs`.
        num_experts: E, including the kept convolution.

    Attributes:
        weight: (E, out, in, k, k).
        bias: (E, out), or None.
        routing: Linear(in, E).

    Raises:
        ValueError: there is less than one expert, or the convolution has groups or a padding mode other than
            zeros.
    """

    def __init__(self, conv: nn.Conv2d, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(
                f"num_experts includes the kept convolution: expected 1 or more, got {num_experts}."
            )
        _check_kind("The kept convolution", conv)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding: Any = conv.padding
        like: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.weight = nn.Parameter(torch.zeros(num_experts, *conv.weight.shape, **like))
        self.bias = (
            None if conv.bias is None else nn.Parameter(torch.zeros(num_experts, len(conv.bias), **like))
        )
        self.routing = nn.Linear(self.in_channels, num_experts, **like)
        nn.init.zeros_(self.routing.weight)
        nn.init.zeros_(self.routing.bias)

    @classmethod
    def like(cls, conv: nn.Conv2d, num_experts: int) -> CLMECondConv2d:
        """A layer of the shape of `conv` with all experts zero, for `load_state_dict`."""
        return cls(conv, num_experts)

    @classmethod
    def from_convs(cls, kept: nn.Conv2d, removed: Sequence[nn.Conv2d]) -> CLMECondConv2d:
        """A layer with the removed convolutions as further experts.

        It equals the kept convolution until it is trained.

        Raises:
            ValueError: the kernels have different shapes, only some convolutions have a bias, or a
                convolution is not supported.
        """
        layer = cls(kept, 1 + len(removed))
        for index, conv in enumerate(removed):
            _check_kind(f"Removed convolution {index}", conv)
            if conv.weight.shape != kept.weight.shape or (conv.bias is None) != (kept.bias is None):
                raise ValueError(
                    f"Experts need kernels of one shape: the kept convolution has {_describe(kept)}, removed"
                    f" convolution {index} has {_describe(conv)}."
                )
        with torch.no_grad():
            for index, conv in enumerate([kept, *removed]):
                layer.weight[index].copy_(conv.weight)
                if layer.bias is not None and conv.bias is not None:
                    layer.bias[index].copy_(conv.bias)
        return layer.train(kept.training)

    @property
    def num_experts(self) -> int:
        """E, including the kept convolution."""
        return len(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, in, h, w) to (b, out, h', w')."""
        offsets = self.routing(x.mean((2, 3)))
        if _free_to_look(x) and (offsets == offsets[:1]).all():
            offsets = offsets[:1]
        groups = len(offsets)
        if groups > 1 and x.shape[2] * x.shape[3] <= FEW_POSITIONS:
            return self._mixed_outputs(x, offsets)
        kernels, biases = self._mixed(offsets)
        # With one group per image, batch and channels are merged; with a single group, x keeps its shape.
        grouped = x.reshape(-1, groups * self.in_channels, *x.shape[2:])
        biases = None if biases is None else biases.flatten()
        out = F.conv2d(
            grouped, kernels.flatten(0, 1), biases, self.stride, self.padding, self.dilation, groups
        )
        return out.reshape(len(x), self.out_channels, *out.shape[2:])

    def _mixed_outputs(self, x: Tensor, offsets: Tensor) -> Tensor:
        """The outputs of all experts, mixed for `offsets` (b, E); equal to the output of the mixed kernel."""
        biases = None if self.bias is None else self.bias.flatten()
        out = F.conv2d(x, self.weight.flatten(0, 1), biases, self.stride, self.padding, self.dilation)
        out = out.unflatten(1, (self.num_experts, self.out_channels))
        return out[:, 0] + (offsets[:, :, None, None, None] * out).sum(1)

    def _mixed(self, offsets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernels (b, out, in, k, k) and biases (b, out) for the weights (1, 0, …, 0) + `offsets`, (b, E)."""
        # W_0 is added outside of the product, because W_0 + 0 is exact in any order of summation and any
        # precision.
        kernels = self.weight[0] + (offsets @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
        return kernels, None if self.bias is None else self.bias[0] + offsets @ self.bias

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The equivalent plain convolution, if the routing does not depend on the image.

        Raises:
            ValueError: the routing has weights, so every image has its own kernel.
        """
        if self.routing.weight.any():
            raise ValueError(
                "This CLMECondConv2d mixes a kernel for every image (its routing weights are up to"
                f" {float(self.routing.weight.abs().max()):.3g}), so no plain convolution equals it. Only a"
                " constant routing, with weights of zero, can be folded."
            )
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            cast(Any, self.kernel_size),
            cast(Any, self.stride),
            self.padding,
            cast(Any, self.dilation),
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        kernels, biases = self._mixed(self.routing.bias[None])
        conv.weight.copy_(kernels[0])
        if conv.bias is not None and biases is not None:
            conv.bias.copy_(biases[0])
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """The settings of the convolution and the number of experts."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride},"
            f" padding={self.padding}, num_experts={self.num_experts}, bias={self.bias is not None}"
        )


def add_cond_convs(student: nn.Module, experts: Mapping[str, Sequence[nn.Conv2d]]) -> dict[str, int]:
    """Replaces convolutions of `student` with `CLMECondConv2d`s, all or none. Its output does not change.

    Args:
        student: changed in place.
        experts: {path of a kept convolution: the removed convolutions that become its experts}.

    Returns:
        {path: number of experts}, which `CLMECondConv2d.like` needs to build the same layers again.

    Raises:
        ValueError: a path has no convolution or no experts, or shapes do not match. The message names the
            path.
    """
    made = {}
    for path, removed in experts.items():
        kept = _at(student, path)
        if not isinstance(kept, nn.Conv2d):
            found = "nothing" if kept is None else f"a {type(kept).__name__}"
            raise ValueError(f"Expected a Conv2d at {path!r} of {type(student).__name__}, found {found}.")
        if not removed:
            raise ValueError(f"There are no removed convolutions for {path!r}: omit the path.")
        try:
            made[path] = CLMECondConv2d.from_convs(kept, removed)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
    for path, layer in made.items():
        _put(student, path, layer)
    _note_in_configs(student)
    return {path: layer.num_experts for path, layer in made.items()}


def fold_cond_convs(module: nn.Module) -> list[str]:
    """Folds every `CLMECondConv2d` inside `module` into a plain convolution, all or none.

    Pass the complete UNet: its config is then updated too, which `save_pretrained` needs.

    Returns:
        The paths of the folded layers.

    Raises:
        ValueError: the routing of a layer is not constant. The message names its path.
    """
    made = {}
    for path, layer in module.named_modules():
        if isinstance(layer, CLMECondConv2d):
            if not path:
                raise ValueError("The module is a CLMECondConv2d itself: use its fold().")
            try:
                made[path] = layer.fold()
            except ValueError as error:
                raise ValueError(f"{path!r}: {error}") from error
    for path, conv in made.items():
        _put(module, path, conv)
    _note_in_configs(module)
    return list(made)


def _note_in_configs(module: nn.Module) -> None:
    """Updates the config of every `ASDMUNet2DConditionModel`, which `from_pretrained` builds from."""
    for unet in module.modules():
        if "cond_convs" in (getattr(unet, "config", None) or {}):
            layers = {n: m for n, m in unet.named_modules() if isinstance(m, CLMECondConv2d)}
            noted = {name: layer.num_experts for name, layer in layers.items()} or None
            cast(Any, unet).register_to_config(cond_convs=noted)


def _free_to_look(x: Tensor) -> bool:
    """Whether a branch may depend on tensor values.

    Such a branch waits for a GPU and breaks a compiled graph. With gradients, it would also send the routing
    gradients of all images to the first one.
    """
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _check_kind(name: str, conv: Any) -> None:
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"{name} must be a torch.nn.Conv2d, got {type(conv).__name__}.")
    if conv.groups != 1 or conv.padding_mode != "zeros":
        raise ValueError(
            f"{name} has groups={conv.groups} and padding_mode={conv.padding_mode!r}: only groups=1 and"
            " 'zeros' are supported."
        )


def _describe(conv: nn.Conv2d) -> str:
    return f"{tuple(conv.weight.shape)} {'without' if conv.bias is None else 'with'} bias"


def _at(module: nn.Module, path: str) -> nn.Module | None:
    return dict(module.named_modules()).get(path) if path else None


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)
