from .istd import compute_istd as compute_istd
