"""The optimizers of the training scripts: AdamW, Muon and Drop-Muon.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) updates a matrix by its momentum with all singular
values set to about one. Drop-Muon (Gruntkowska et al., arXiv:2510.02239) updates only a random suffix of the layers in
each step, so that backpropagation can stop early.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim import Muon as MatrixMuon

# Layers at the ends of a network and embeddings, of which a matrix is no map between hidden states. Modulation layers
# (`norm*.linear`) map the time to scales and shifts.
_NOT_HIDDEN = re.compile(
    r"(^|\.)(conv_in|conv_out|proj_in_out|norm\w*|time_embedding|time_proj|time_text_embed|time_embed|class_embedding"
    r"|add_embedding|pos_embed|patch_embed|patch_embedding|x_embedder|context_embedder|caption_projection"
    r"|encoder_hid_proj|adaln_single|embeddings|t_embedder|y_embedder)(\.|$)|^proj_out(\.|$)"
)


def hidden_matrices(model: nn.Module) -> list[str]:
    """Names of the trained weights that Muon updates, in the order in which the network uses them.

    These are the weights of linear layers and 2-D convolutions between hidden states, and the matrices of LoRAs.

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
        lora = "lora_" in path
        if isinstance(module, nn.Linear | nn.Conv2d) and (lora or not _NOT_HIDDEN.search(path)):
            names.append(f"{path}.weight")
    return sorted(names, key=_place)


def _place(name: str) -> int:
    # UNets register their middle block last. Python's sort keeps the order of equals.
    return 2 if "up_blocks" in name or "conv_norm_out" in name else 1 if "mid_block" in name else 0


class Muon(torch.optim.Optimizer):
    """Muon on the hidden matrices and AdamW on all other parameters, as one optimizer.

    It is `torch.optim.Muon`, with convolution weights (out, in, k, k) as matrices (out, in · k · k). The update of a
    matrix (A, B) is scaled by 0.2 √max(A, B), the root mean square of AdamW's, so that both share a learning rate.

    Args:
        named_parameters: the trained parameters by name.
        matrices: names of those that Muon updates, see `hidden_matrices`.
        lr: learning rate of both.
        weight_decay: decoupled weight decay of both.
        momentum: of Muon.
        betas, eps: of AdamW.

    Raises:
        ValueError: a parameter that is sharded, or a convolution weight in the channels-last layout.
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
    ) -> None:
        named = dict(named_parameters)
        names = list(matrices)
        for name in names:
            _check_matrix(name, named[name])
        matrix = [named[name] for name in names]
        chosen = set(names)
        rest = [parameter for name, parameter in named.items() if name not in chosen]
        # An empty group is allowed, so that the two groups have fixed places.
        super().__init__(
            [{"params": matrix, "lr": lr}, {"params": rest, "lr": lr}], {"weight_decay": weight_decay}
        )
        self._views = [nn.Parameter(_as_matrix(p.data)) for p in matrix]
        self._muon = (
            MatrixMuon(
                self._views,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            if matrix
            else None
        )
        self._adamw = AdamW(rest, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps) if rest else None
        self._first = 0

    def drop_before(self, first: int) -> None:
        """In the following steps, the matrices with indices below `first` and their momentum are not changed."""
        self._first = first

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients of the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, rest = self.param_groups
        for number, (view, parameter) in enumerate(zip(self._views, matrices["params"])):
            grad = None if number < self._first else parameter.grad
            view.data = _as_matrix(parameter.data)  # it may have been moved to another device
            view.grad = None if grad is None else grad.reshape(view.shape)
        for inner, group in ((self._muon, matrices), (self._adamw, rest)):
            if inner is not None:
                inner.param_groups[0].update(lr=group["lr"], weight_decay=group["weight_decay"])
                inner.step()
        for view in self._views:
            view.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimizers, and the settings of the groups."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        inner = {"muon": self._muon, "adamw": self._adamw}
        return {
            "state": {name: None if part is None else part.state_dict() for name, part in inner.items()},
            "param_groups": settings,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a result of `state_dict`.

        Raises:
            ValueError: it is that of another optimizer, or of other parameters.
        """
        state = state_dict["state"]
        if state.keys() != {"muon", "adamw"}:
            raise ValueError(
                "The checkpoint was written with another optimizer: resume with the --optimizer of the run."
            )
        for name, inner in (("muon", self._muon), ("adamw", self._adamw)):
            if (inner is None) != (state[name] is None):
                raise ValueError(
                    "The checkpoint was written for other parameters than those that are trained now."
                )
            if inner is not None:
                inner.load_state_dict(state[name])
        for group, settings in zip(self.param_groups, state_dict["param_groups"]):
            group.update(settings)


def _check_matrix(name: str, parameter: Tensor) -> None:
    if hasattr(parameter, "full_tensor"):
        raise ValueError(
            f"Muon needs whole matrices, and {name} is sharded over processes: use --optimizer adamw."
        )
    if not parameter.is_contiguous():
        raise ValueError(
            f"Muon needs contiguous weights, and {name} is in another memory format (channels_last?): convert the model"
            " with model.to(memory_format=torch.contiguous_format)."
        )


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.view(len(weight), -1)
