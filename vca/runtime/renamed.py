"""Renamed and added config keys: an old name is an error that gives the new one; old `config.json` files load."""

from typing import Any

RENAMED = {
    "attention.pool": "attention.contrast_grid",
    "attention.positive": "attention.positive_stream",
    "attention.negative": "attention.negative_stream",
    "model.contrast_grids": "model.contrast_grid",
    "augment.erase_prob": "augment.re_prob",
    "augment.erase_mode": "augment.re_mode",
    "augment.erase_count": "augment.re_count",
    "augment.mix_prob": "augment.mixup_prob",
    "augment.mix_switch_prob": "augment.mixup_switch_prob",
    "augment.repeats": "augment.aug_repeats",
    "trainer.global_batch": "trainer.global_batch_size",
    "trainer.micro_batch": "trainer.micro_batch_size",
    "trainer.eval_batch": "trainer.eval_batch_size",
    "sampler.guidance": "sampler.cfg_scale",
    "sampler.guidance_channels": "sampler.cfg_channels",
    "sampler.guidance_interval": "sampler.cfg_interval",
    "sampler.form": "sampler.diffusion_form",
    "sampler.norm": "sampler.diffusion_norm",
    "cluster.minutes": "cluster.time_minutes",
    "cluster.parallel": "cluster.max_parallel_jobs",
    "sampler=ode": "sampler=ode_heun",
    "sampler=dopri5": "sampler=ode_dopri5",
    "sampler=sde": "sampler=sde_euler",
    "ablation=readings": "ablation=paper_ambiguities",
    "recipe=leaplab_cswin_tiny": "recipe=agent_cswin_tiny",
    "recipe=leaplab_deit_small": "recipe=agent_deit_small",
    "recipe=leaplab_deit_tiny": "recipe=agent_deit_tiny",
    "recipe=leaplab_pvt_tiny": "recipe=agent_pvt_tiny",
    "optim.schedule=per_step": "optim.schedule_unit=step",
    "optim.schedule=per_epoch": "optim.schedule_unit=epoch",
    "optim.schedule=per_epoch_late": "optim.schedule_unit=epoch_late",
    "trainer.compile=true": "trainer.compile=default",
    "trainer.compile=false": "trainer.compile='off'",  # quoted, because YAML reads off as false
}

# Keys of `trainer` that runs of train_gen.py once had, without effect.
CLASSIFIER_KEYS = ("eval_batch_size", "init_from", "init_weights", "eval_only")

CONDITIONAL = {"conditional_position": False}
# Keys added later, with the value that is equal to runs without them: by group, and attention name or model family.
ADDED: dict[tuple[str, str | None], dict[str, Any]] = {
    ("attention", None): {"local_kernel": 3, "local_shared": False, "gate": "none", "qk_norm": False},
    ("attention", "vca"): {"lambda_form": "scalar", "norm": True},
    ("model", "deit"): {"class_token": True, "pos_embed": True, "norm": "layer", **CONDITIONAL},
    ("model", "pvt"): CONDITIONAL,
    ("model", "swin"): CONDITIONAL,
    ("model", "cswin"): CONDITIONAL,
    ("model", "dit"): {"qkv_bias": True, "proj_drop": 0.0, **CONDITIONAL},
}


def with_new_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's config with old keys renamed, or removed if they had no effect, and later keys added."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for old, new in RENAMED.items():
        if "=" in old:
            continue
        group, key = old.split(".")
        values = config.get(group)
        if isinstance(values, dict) and key in values:
            values[new.split(".")[1]] = values.pop(key)
    optim = config.get("optim")
    if isinstance(optim, dict) and "schedule_unit" not in optim and "schedule" in optim:
        unit = optim["schedule"].removeprefix("per_") if optim["schedule"].startswith("per_") else "step"
        optim |= {"schedule_unit": unit, "schedule": "constant" if optim["schedule"] == "constant" else "cosine"}
    trainer = config.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get("compile"), bool):
        trainer["compile"] = "default" if trainer["compile"] else "off"
    if "objective" in config and isinstance(config.get("trainer"), dict):
        for key in CLASSIFIER_KEYS:
            config["trainer"].pop(key, None)
    for (group, kind), values in ADDED.items():
        section = config.get(group)
        if isinstance(section, dict) and kind in (None, section.get("name"), section.get("family")):
            config[group] = section | {key: value for key, value in values.items() if key not in section}
    return config
