"""Run in the official clients' environment: the cookbook fetches checkpoints and makes models of them.

stdin: a JSON list of {"path": the checkpoint, "base_model": its folder, "adapter": where to download it to, "output":
where to write the merged model, or null for none}.
"""

import json
import sys

from tinker_cookbook import weights

for job in json.load(sys.stdin):
    weights.download(tinker_path=job["path"], output_dir=job["adapter"])
    if job["output"]:
        options = {"dtype": "float32", "merge_strategy": "full"}
        weights.build_hf_model(
            base_model=job["base_model"], adapter_path=job["adapter"], output_path=job["output"], **options
        )
