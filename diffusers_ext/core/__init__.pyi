from .images import encode_images as encode_images
