"""Which functions are taken to write a checkpoint, by their names."""

import threading

import pytest

from autoteardown.checkpoints.in_progress import SavesInProgress
from autoteardown.training import gate

# Of Accelerate, safetensors, Transformers, Lightning, DeepSpeed, Megatron-core, Composer; and of programs' own.
SAVE = [
    "save",
    "save_state",
    "save_file",
    "save_pretrained",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "save_checkpoint",
    "async_save",
    "dump_checkpoint",
    "saveModel",
    "write_ckpt",
    "take_snapshot",
    "upload_checkpoint",
]
# `checkpoint` is torch's activation checkpointing, in every forward pass that uses it.
DO_NOT = [
    "checkpoint",
    "save_for_backward",
    "saved_tensors",
    "should_save",
    "_should_save_on_train_epoch_end",
    "register_save_state_pre_hook",
    "load_checkpoint",
    "training_step",
    "uploaded",
]


def inside(name, then):
    """Call `then` in a function that is called so."""
    scope = {}
    exec(f"def {name}(then):\n    return then()", scope)
    return scope[name](then)


def shields():
    """Whether this thread is taken to save."""
    return SavesInProgress().shields(threading.get_ident())


@pytest.mark.parametrize("name", SAVE)
def test_names_of_functions_that_save(name):
    assert inside(name, shields)
    assert inside(name, lambda: inside("write", shields))


@pytest.mark.parametrize("name", DO_NOT)
def test_names_of_functions_that_do_not(name):
    assert not inside(name, shields)


def test_a_function_that_trains_does_not():
    """Whatever it is called; a function that saves inside it does."""
    saves, thread = SavesInProgress(), threading.get_ident()

    def train():
        assert saves.shields(thread)
        saves.does_more()
        assert not saves.shields(thread)
        assert inside("save_model", lambda: saves.shields(thread))

    inside("train_and_save", train)


def test_a_function_that_polls_does_not():
    """`stop_requested()` is the clock of a program that has no optimizer."""

    def then():
        gate.renew()
        gate.poll()
        return gate.gate.saves.shields(threading.get_ident())

    assert not inside("generate_and_save", then)


def test_nothing_is_saved_after_the_callbacks():
    """Their thread has ended then, and the next thread may have its identifier."""
    saves = SavesInProgress()
    ident = threading.get_ident()
    with saves.on_this_thread():
        saves.enter(ident)
        saves.leave(ident)
        assert saves.shields(ident)
    assert not saves.shields(ident)
