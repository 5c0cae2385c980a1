"""megatron_longvila.train with harm done to one rank at one step: `harmful_train.py HARM RANK STEP [flags of the program]`.

exception: raises where only this rank is; nan: makes a gradient of this rank NaN; sleep: never goes on, in Python.
"""

from __future__ import annotations

import os
import sys
import time


def exception(run) -> None:
    raise KeyError("harm was done")


def nan(run) -> None:
    weight = run.state.model.language_model.decoder.final_layernorm.weight
    weight.expand_as(weight).grad_fn.next_functions[0][0].register_prehook(lambda grads: (grads[0] * float("nan"),))


def sleep(run) -> None:
    time.sleep(600)


HARMS = {"exception": exception, "nan": nan, "sleep": sleep}


def main() -> None:
    harm, rank, step = HARMS[sys.argv[1]], sys.argv[2], int(sys.argv[3])
    from megatron_longvila import train
    from megatron_longvila.training import loop

    real = loop.train_step

    def train_step(run, batch, number, stop_requested):
        if number == step and os.environ["RANK"] == rank:
            harm(run)
        return real(run, batch, number, stop_requested)

    loop.train_step = train_step
    train.main(sys.argv[4:])


if __name__ == "__main__":
    main()
