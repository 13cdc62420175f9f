"""MkDocs hook: publishes the images of benchmarks/results as results/*.png, so that no copy lies under docs/."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the images to the site."""
    results = Path(config.config_file_path).parent / "benchmarks" / "results"
    for image in sorted(results.glob("*.png")):
        files.append(File.generated(config, f"results/{image.name}", abs_src_path=str(image)))
    return files
