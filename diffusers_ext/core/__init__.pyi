from .images import encode_images as encode_images
from .shipped import pipeline_path as pipeline_path
