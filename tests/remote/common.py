"""What the tests of blocks on servers share."""

import torch
from model.families import VOCABULARY
from model.oracle import pad

LAYERS = 4
COUNT = 4


def settings_for(mode):
    if mode == "none":
        return {}
    if mode == "shallow":
        return {"tuning_mode": "ptune", "pre_seq_len": COUNT}
    return {"tuning_mode": "deep_ptune", "pre_seq_len": COUNT, "deep_prompt_mode": mode}


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def give(far, local):
    """``far`` the trained parameters of ``local``, which are made random."""
    theirs = dict(far.named_parameters())
    with torch.no_grad():
        for name, parameter in trained(local).items():
            parameter.normal_(std=0.5)
            theirs[name].copy_(parameter)


def batch_of(padding, lengths=(7, 3, 9, 1, 6)):
    """Token ids [b, n] and their mask, or ``None`` without padding."""
    return pad([torch.randint(3, VOCABULARY, (6 if padding == "none" else n,)) for n in lengths], padding, 0)
