from .recipe import Recipe as Recipe
from .tuning import tune as tune
