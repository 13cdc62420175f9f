"""SIGN: a one- or few-step generator and projector, distilled from a diffusion model.

Zaman, Liu and Chiu, *Score-based Idempotent Distillation of Diffusion Models*, arXiv:2509.21470. The entry
point is `SIGNPipeline`.
"""

from ..core.methods import register

__getattr__, __dir__ = register(
    __name__,
    __file__,
    title="SIGN",
    describe="pipelines:describe",
    commands="commands:add_commands",
    checks={
        "SIGN, as the teacher": "teacher:check_pipeline",
    },
)
