"""The benchmarks: every page of figures is made by one command, `python -m benchmarks NAME`."""

# What `python -m benchmarks` lists, in the order of the documentation. Each is a module with `WRITES`, the files that it
# makes, and `main(bench)`, which makes them.
NAMES = (
    "coverage",
    "base_models",
    "judges",
    "teleport",
    "teleport_flow",
    "from_score",
    "cost",
    "golden_noise",
    "golden_noise_flow",
    "golden_noise_cost",
    "smooth_lora",
    "smooth_lora_flow",
    "smooth_lora_cost",
    "sign",
    "sign_text",
    "sign_editing",
    "asdm",
    "asdm_flow",
    "gri_error",
    "gri_joint",
    "gri_images",
    "unet_speed",
    "transformer_speed",
    "optimizers",
    "training_memory",
    "training_throughput",
)
