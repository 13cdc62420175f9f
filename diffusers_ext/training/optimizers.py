"""The optimizers of the training scripts: AdamW, Muon and Drop-Muon.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) updates a matrix by its momentum with all singular
values set to about one. Drop-Muon (Gruntkowska et al., arXiv:2510.02239) updates only a random suffix of the layers in
each step, so that backpropagation can stop early.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import AdamW

# A block of a network, and the path to it. Outside of the blocks are only the ends of a network and embeddings.
_BLOCK = re.compile(r"^.*?(\b(\w*blocks|layers|\w*refiner)\.\d+|\bmid_block)\b")
# Matrices in blocks that do not lead to a hidden state, or not from one: modulations by the time, weights of experts.
_NOT_HIDDEN = re.compile(r"\.(norm\w*|time_emb_proj|routing)\.")


def check_optimizer(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Refuses at the start of a run an optimizer that it cannot have.

    Args:
        args: as from `add_training_arguments`.
        accelerator: of the run.

    Raises:
        ValueError: a package is missing, arguments exclude each other, or Muon's matrices would be sharded.
    """
    name = args.optimizer
    if args.drop_muon_sharp and name != "drop_muon":
        raise ValueError(f"--drop_muon_sharp has no effect on --optimizer {name}: omit it, or use drop_muon.")
    if args.use_8bit_adam and name != "adamw":
        raise ValueError(f"--use_8bit_adam is for --optimizer adamw, got {name}: omit one of them.")
    if args.use_8bit_adam and find_spec("bitsandbytes") is None:
        raise ValueError("--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes.")
    if name == "adamw":
        return
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"--optimizer {name} needs whole matrices, and {kind.value} shards them over processes: use --optimizer"
            " adamw, or launch with --multi_gpu."
        )


def make_optimizer(args: argparse.Namespace, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer` for the trained parameters of a model.

    Args:
        args: as from `add_training_arguments`.
        model: its parameters with `requires_grad` are trained. A method `rate_factors` returns a factor of the learning
            rate for each module of its method `networks`, which have all of them.
        learning_rate: of a module with the factor 1.

    Raises:
        ValueError: see `hidden_matrices` and `Muon`; or there is nothing for Muon, or it is to have several rates.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.adam_weight_decay,
    }
    factors = model.rate_factors() if hasattr(model, "rate_factors") else [1.0]  # type: ignore[operator]
    groups: Any = list(named.values())
    if set(factors) != {1.0}:
        if args.optimizer != "adamw":
            raise ValueError(
                f"--optimizer {args.optimizer} has one learning rate for all networks, and {type(model).__name__} has the"
                f" factors {', '.join(f'{factor:g}' for factor in factors)}: use --optimizer adamw, or equal rates."
            )
        networks: Any = model.networks()  # type: ignore[operator]
        groups = [
            {"params": [p for p in part.parameters() if p.requires_grad], "lr": factor * learning_rate}
            for part, factor in zip(networks, factors)
        ]
    if args.use_8bit_adam:
        import bitsandbytes  # type: ignore[import-not-found]

        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    if args.optimizer == "adamw":
        return AdamW(groups, **settings)
    matrices = hidden_matrices(model)
    if not matrices:
        raise ValueError(
            f"--optimizer {args.optimizer} needs matrices in blocks, of which {type(model).__name__} has none: use"
            " --optimizer adamw."
        )
    return Muon(named.items(), matrices, **settings, sharp=args.drop_muon_sharp)


def hidden_matrices(model: nn.Module) -> list[str]:
    """Names of the trained weights that Muon updates.

    These are the weights of linear layers and 2-D convolutions in the blocks of the network, except those that map the
    time, and the matrices of LoRAs.

    Raises:
        ValueError: a trained convolution weight in another number of dimensions.
    """
    names = []
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
            continue
        if isinstance(module, nn.Conv1d | nn.Conv3d):
            raise ValueError(
                f"Muon supports linear layers and 2-D convolutions, and {path} is a {type(module).__name__} with a"
                f" weight of shape {tuple(weight.shape)}: use --optimizer adamw."
            )
        # The weight of a convolution in groups is no matrix between all channels.
        dense = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        hidden = _BLOCK.search(path) and not _NOT_HIDDEN.search(f"{path}.")
        if dense and ("lora_" in path or hidden):
            names.append(f"{path}.weight")
    return names


# --- Drop-Muon's random suffix of layers ---


def layers_of(network: nn.Module) -> list[list[nn.Parameter]]:
    """The trained parameters of a network by layers, in the order in which it uses them.

    A layer is a block, such as `down_blocks.0` or `mid_block` of a UNet. What a network uses before its first block
    (its input layer, the embeddings of time and classes, a text encoder) belongs to the first layer, and what it uses
    after its last block to the last.

    Raises:
        ValueError: there are fewer than two layers.
    """
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    layers: list[list[nn.Parameter]] = [[]]
    current = None
    for name, parameter in sorted(named, key=lambda pair: _place(pair[0])):
        found = None if _place(name) < 0 else _BLOCK.search(name)
        if found and found[0] != current:
            layers += [[]] if current else []
            current = found[0]
        layers[-1].append(parameter)
    if len(layers) < 2:
        raise ValueError(
            f"--optimizer drop_muon needs a network with two blocks or more, got {type(network).__name__}: use"
            " --optimizer muon."
        )
    return layers


def _place(name: str) -> int:
    # UNets register their middle block last, and objectives a text encoder. Python's sort keeps the order of equals.
    if "text_encoder" in name:
        return -1
    if "up_blocks" in name or re.search(r"\bconv_(norm_)?out\b", name):
        return 2
    return 1 if "mid_block" in name else 0


def dropped_in_step(
    networks: Sequence[Sequence[Sequence[nn.Parameter]]], seed: int, step: int
) -> list[nn.Parameter]:
    """The parameters that Drop-Muon does not update in a step: those of all layers before a random one.

    Every layer is the first that is updated with the same probability. The draw depends on `(seed, step)` only, so
    that it is equal in all processes and in a resumed run.

    Args:
        networks: the layers of every network, see `layers_of`.
        seed: of the run.
        step: number of the optimization step.
    """
    draw = random.Random(f"Drop-Muon {seed} {step}").random()
    return [p for layers in networks for layer in layers[: int(draw * len(layers))] for p in layer]


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it, no gradients are computed for parameters, and backpropagation does not reach what is before them."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    guard = nn.modules.module.register_module_forward_pre_hook(_contiguous) if parameters else None
    try:
        yield
    finally:
        if guard is not None:
            guard.remove()
        for parameter in parameters:
            parameter.requires_grad_(True)


def _contiguous(module: nn.Module, inputs: Any) -> Any:
    # torch 2.13 ends the process in the backward pass of this layer on a CPU if its input is channels-last, as after
    # an attention layer, and needs no gradient.
    crashes = isinstance(module, nn.GroupNorm) and inputs[0].device.type == "cpu" and torch.is_grad_enabled()
    return tuple(value.contiguous() for value in inputs) if crashes and not inputs[0].requires_grad else None


class Muon(torch.optim.Optimizer):
    """Muon on the hidden matrices and AdamW on all other parameters, as one optimizer.

    The updates of matrices are those of `torch.optim.Muon`, with convolution weights (out, in, k, k) as matrices
    (out, in · k · k). They are scaled by 0.2 √max(A, B) for a matrix (A, B), the root mean square of AdamW's, so that
    both share a learning rate. Parameters without a gradient are not changed, nor is their momentum.

    It does not use `torch.optim.Muon`, which iterates in bfloat16 everywhere: CPUs without instructions for it take
    15 times as long as in float32. See `orthogonalized`.

    Args:
        named_parameters: the trained parameters by name.
        matrices: names of those that Muon updates, see `hidden_matrices`.
        lr: learning rate of both.
        weight_decay: decoupled weight decay of both.
        momentum: of Muon.
        betas, eps: of AdamW.
        sharp: multiply the update of a matrix by the nuclear norm of its momentum. This is the sharp operator of
            arXiv:2510.02239; without it, the update is that of the linear minimisation oracle.

    Raises:
        ValueError: a parameter that is sharded.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        matrices: Iterable[str],
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        sharp: bool = False,
    ) -> None:
        named = dict(named_parameters)
        names = list(matrices)
        for name in names:
            if hasattr(named[name], "full_tensor"):
                raise ValueError(
                    f"Muon needs whole matrices, and {name} is sharded over processes: use --optimizer adamw."
                )
        chosen = set(names)
        rest = [parameter for name, parameter in named.items() if name not in chosen]
        groups = [{"params": [named[name] for name in names]}, {"params": rest}]
        # An empty group is allowed, so that the two groups have fixed places.
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self._adamw = AdamW(rest, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps) if rest else None
        self._momentum, self._sharp = momentum, sharp

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients of the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, rest = self.param_groups
        for parameter in matrices["params"]:
            if parameter.grad is not None:
                self._update(parameter, matrices["lr"], matrices["weight_decay"])
        if self._adamw is not None:
            self._adamw.param_groups[0].update(lr=rest["lr"], weight_decay=rest["weight_decay"])
            self._adamw.step()
        return loss

    def _update(self, parameter: nn.Parameter, lr: float, weight_decay: float) -> None:
        grad: Any = parameter.grad
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grad)
        averaged = state["momentum"].lerp_(grad, 1 - self._momentum)
        nesterov = grad.lerp(averaged, self._momentum).flatten(1)
        scale = 0.2 * max(nesterov.shape) ** 0.5
        if self._sharp:
            scale *= float(torch.linalg.matrix_norm(nesterov.float(), "nuc"))
        update = orthogonalized(nesterov).reshape(parameter.shape).to(parameter.dtype)
        parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * scale)

    def state_dict(self) -> dict[str, Any]:
        """The momentum of the matrices, the state of AdamW, and the settings of the groups."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        state = {
            "muon": [self.state[p].get("momentum") for p in self.param_groups[0]["params"]],
            "adamw": None if self._adamw is None else self._adamw.state_dict(),
        }
        return {"state": state, "param_groups": settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a result of `state_dict`.

        Raises:
            ValueError: it is that of another optimizer, or of other parameters.
        """
        state, matrices = state_dict["state"], self.param_groups[0]["params"]
        if state.keys() != {"muon", "adamw"}:
            raise ValueError(
                "The checkpoint was written with another optimizer: resume with the --optimizer of the run."
            )
        shapes = [parameter.shape for parameter in matrices]
        fits = len(shapes) == len(state["muon"]) and all(
            found is None or found.shape == shape for found, shape in zip(state["muon"], shapes)
        )
        if not fits or (self._adamw is None) != (state["adamw"] is None):
            raise ValueError(
                "The checkpoint was written for other parameters than those that are trained now."
            )
        for parameter, found in zip(matrices, state["muon"]):
            self.state[parameter] = {} if found is None else {"momentum": found.to(parameter, copy=True)}
        if self._adamw is not None:
            self._adamw.load_state_dict(state["adamw"])
        for group, settings in zip(self.param_groups, state_dict["param_groups"]):
            group.update(settings)


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix (a, b) with all singular values set to about one, by Muon's five Newton–Schulz iterations.

    Jordan et al. 2024. The iterations are in bfloat16 on a GPU, as in `torch.optim.Muon`, and in float32 on a CPU.
    """
    a, b, c = 3.4445, -4.775, 2.0315
    found = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    wide = found.shape[0] <= found.shape[1]
    found = found if wide else found.T
    found = found / found.norm().clamp(min=1e-7)  # no singular value is above one
    for _ in range(5):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found if wide else found.T
