from .lora import load_sign_lora as load_sign_lora
from .pipelines import SIGNPipeline as SIGNPipeline
from .source import MixtureSource as MixtureSource
from .source import PromptSource as PromptSource
