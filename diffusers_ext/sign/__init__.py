"""SIGN: an idempotent one- or few-step projector distilled from a diffusion model.

Zaman, Liu and Chiu, *Score-based Idempotent Distillation of Diffusion Models*, arXiv:2509.21470. Use: `SIGNPipeline`.
"""

from ..core.methods import register

__getattr__, __dir__ = register(
    __name__,
    __file__,
    title="SIGN",
    describe="pipelines:describe",
)
