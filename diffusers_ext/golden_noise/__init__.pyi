from .apply import apply_golden_noise as apply_golden_noise
from .apply import golden_latents as golden_latents
from .apply import remove_golden_noise as remove_golden_noise
from .npnet import NPNetModel as NPNetModel
from .redenoising import redenoise as redenoise
