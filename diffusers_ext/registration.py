"""Makes diffusers record and accept our component classes in `model_index.json`.

diffusers writes a component as `["diffusers_ext", "<Class>"]`, and finds it again, only if the top-level
package is listed in its table of known libraries; otherwise it writes the dotted module path and warns.
Every module that defines a component imports this one.
"""

from diffusers.pipelines import pipeline_loading_utils

pipeline_loading_utils.LOADABLE_CLASSES.setdefault(
    "diffusers_ext",
    {
        "SchedulerMixin": ["save_pretrained", "from_pretrained"],
        "ModelMixin": ["save_pretrained", "from_pretrained"],
    },
)
