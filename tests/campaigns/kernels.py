"""Counts the operations of one compiled training step on this machine's device, as a table.

python -m tests.campaigns.kernels
"""

import collections
import os
import re

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf

from avb_tf import tables
from avb_tf.commands import train
from avb_tf.configs import benchmark, mnist
from avb_tf.training import loops

RUNS = ((mnist, "vae"), (mnist, "avb_flow"), (benchmark, "mlp"))
EVENT_SHAPE = (28, 28, 1)
COUNTED = ("fusion", "dot", "convolution", "custom-call", "conditional")


def counts(hlo: str) -> collections.Counter[str]:
    """Counts operations of an optimised program by name, except those inside fused computations."""
    counted: collections.Counter[str] = collections.Counter()
    inside = False
    for line in hlo.splitlines():
        if head := re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            inside = re.search(r"fused|region|reduc", head[1]) is not None
        elif not inside and (operation := re.match(r"^\s+.* = .*?\b([a-z\-]+)\(", line)):
            counted[operation[1]] += 1
    return counted


def main():
    """Compiles a step of each run and prints the counts."""
    rows = [["a step of", *(name for _, name in RUNS)]]
    columns = {operation: [operation] for operation in COUNTED}
    for experiment, name in RUNS:
        config = experiment.get_config(name)
        model = train.create(config, EVENT_SHAPE)
        model.jit_compile = True
        program = loops._program(model, lambda _, x, model=model: model.train_step(x))
        x = tf.zeros([config.batch_size, *EVENT_SHAPE])
        hlo = program.experimental_get_compiler_ir(tf.constant(1), x)(stage="optimized_hlo")
        counted = counts(hlo)
        for operation, column in columns.items():
            column.append(str(counted[operation]))
        print(name, dict(counted), flush=True)
    print(tables.aligned([*rows, *columns.values()]))


if __name__ == "__main__":
    main()
