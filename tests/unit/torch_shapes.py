"""Records which of torch's API the agent uses, from the Python sources and stubs in torch's own wheels.

    pip download --no-deps --only-binary=:all: --platform macosx_11_0_arm64 --python-version 3.11 torch==2.4.0
    python tests/unit/torch_shapes.py *.whl >tests/unit/torch_shapes.json

(The wheels for macOS are the small ones; the sources are the same in all.)
"""

import ast
import json
import sys
import zipfile
from pathlib import Path

FUNCTIONS = {
    "torch/distributed/distributed_c10d.py": (
        "init_process_group destroy_process_group is_initialized get_rank get_world_size get_backend"
        " _get_default_store _shutdown_backend _abort_process_group"
    ),
    "torch/optim/optimizer.py": "register_optimizer_step_post_hook",
    "torch/serialization.py": "save",
    "torch/distributed/checkpoint/state_dict_saver.py": "save save_state_dict async_save",
    "torch/cuda/__init__.py": "is_initialized synchronize device_count",
}
CLASSES = {
    "torch/distributed/distributed_c10d.py": {"_World": "pg_names pg_backend_config"},
    "torch/_C/_distributed_c10d.pyi": {
        "ProcessGroup": "abort shutdown _get_backend",
        "Backend": "abort shutdown",
        "ProcessGroupNCCL": "abort _shutdown",
        "ProcessGroupGloo": "abort _shutdown",
        "Store": "add set get compare_set set_timeout wait",
        "TCPStore": "__init__ host port",
        "PrefixStore": "underlying_store",
    },
    "torch/distributed/checkpoint/state_dict_saver.py": {"AsyncSaveResponse": "upload_completion"},
}
IMPORTED = {"torch/utils/data/_utils/signal_handling.py": "_set_worker_signal_handlers"}


def names(node):
    """What a class body defines: functions, and annotated attributes."""
    functions = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
    targets = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
    attributes = [each.id for each in targets if isinstance(each, ast.Name)]
    return functions + attributes


def shape(wheel):
    """What one wheel has of all that."""
    with zipfile.ZipFile(wheel) as archive:
        present = set(archive.namelist())

        def parse(path):
            return ast.parse(archive.read(path)) if path in present else ast.parse("")

        found = {"source": Path(wheel).name}
        for path, wanted in FUNCTIONS.items():
            defined = names(parse(path))
            found[path] = " ".join(name for name in wanted.split() if name in defined)
        for path, classes in CLASSES.items():
            defined = {each.name: names(each) for each in parse(path).body if isinstance(each, ast.ClassDef)}
            for name, wanted in classes.items():
                has = defined.get(name, ())
                found[name] = " ".join(each for each in wanted.split() if each in has)
        for path, name in IMPORTED.items():
            found[path] = name if name in archive.read(path).decode() else ""
    return found


if __name__ == "__main__":
    shapes = {Path(wheel).name.split("-")[1]: shape(wheel) for wheel in sys.argv[1:]}
    json.dump(shapes, sys.stdout, indent=1, sort_keys=True)
    print()
