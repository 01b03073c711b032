"""A search over the training config: Optuna proposes, ASHA stops the weak, the best is kept."""

from __future__ import annotations

import os
from typing import Any

import optuna
import pandas as pd
import yaml
from ray import tune as raytune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from manta import spec, storage
from manta.errors import InputError, MantaError
from manta.spec import ScalingConfig, SearchDimension, TrainConfig, TuneConfig
from manta.workloads import history, layout, session, train, trial
from manta.workloads import job as jobs
from manta.workloads.entry import progress
from manta.workloads.job import Job

STEP = "step"


def tune(config: TuneConfig) -> dict[str, str]:
    """Search, or go on with the search of that name; artifact → URL.

    Raises:
        InputError: the search does not fit the training config or the dataset, or one of this
            name searched something else.
        MantaError: no trial succeeded.
    """
    job = jobs.prepare(_trial_config(config))
    url = jobs.absolute(layout.tuning(config.name))
    artifacts = {
        "best": storage.join(url, "best.yaml"),
        "trials": storage.join(url, "trials.csv"),
        "plot": storage.join(url, "trials.png"),
    }
    _claim(config, job, url)
    if all(map(storage.exists, artifacts.values())):
        progress(f"search `{config.name}` is finished already")
        return artifacts
    trials = _trials(config, _search(config, job, url))
    storage.write_bytes(artifacts["trials"], trials.drop(columns="curve").to_csv().encode())
    _draw(artifacts["plot"], trials, config)
    best = {key: trials.iloc[0][key] for key in config.search}
    storage.write_bytes(artifacts["best"], _yaml(best))  # last: it says that the search is done
    _print(trials, config)
    return artifacts


def _trial_config(config: TuneConfig) -> TrainConfig:
    """The training config of one trial. Raises InputError if a searched key does not fit it."""
    base = spec.load(config.base, TrainConfig)
    for key, dimension in config.search.items():
        for value in _edges(dimension):
            jobs.override(base, {key: value})
    scaling = ScalingConfig(
        num_workers=1, cpus_per_worker=config.cpus_per_trial, gpus_per_worker=config.gpus_per_trial
    )
    short = {"num_steps": config.num_steps, "scaling": scaling, "tuned": None}
    return base.model_copy(update=short)


def _edges(dimension: SearchDimension) -> tuple[Any, ...]:
    return dimension.choice or dimension.log_uniform or dimension.uniform or ()


def _claim(config: TuneConfig, job: Job, url: str) -> None:
    """Note what is searched; refuse to go on with a search of something else."""
    note = storage.join(url, "search.json")
    asked = config.model_dump(mode="json") | {"trial": job.identity}
    now = {
        **{f"search {key}": value for key, value in asked.pop("search").items()},
        **asked.pop("trial"),
        **asked,
    }
    if not storage.exists(note):
        storage.write_json(note, now)
    before = storage.read_json(note)
    changed = [
        key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
    ]
    if changed:
        raise InputError(
            f"search `{config.name}` was made with other settings of {', '.join(changed)}",
            f"give the search another name, or delete {url} to make it afresh",
        )


def _search(config: TuneConfig, job: Job, url: str) -> raytune.ResultGrid:
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # what a killed search loses at most
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # else verbose=0 still draws tables
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    session.connect()
    train.check_resources(job.config.scaling)
    progress(f"{config.num_trials} trials of at most {config.num_steps} steps")
    filesystem, path = storage.arrow_filesystem(url)
    trainable = _trainable(config, job)
    if raytune.Tuner.can_restore(path, storage_filesystem=filesystem):
        progress(f"going on with search `{config.name}`")
        tuner = raytune.Tuner.restore(
            path, trainable, storage_filesystem=filesystem, restart_errored=True
        )
    else:
        tuner = _tuner(config, job, trainable, path, filesystem)
    return tuner.fit()


def _trainable(config: TuneConfig, job: Job) -> Any:
    function = raytune.with_parameters(trial.run_trial, job=job, report_every=config.grace_steps)
    return raytune.with_resources(
        function, {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
    )


def _tuner(config: TuneConfig, job: Job, trainable: Any, path: str, filesystem: Any) -> Any:
    parent, _, name = path.rpartition("/")
    return raytune.Tuner(
        trainable,
        param_space={key: _space(dimension) for key, dimension in config.search.items()},
        tune_config=raytune.TuneConfig(
            metric=trial.METRIC,
            mode="min",
            num_samples=config.num_trials,
            max_concurrent_trials=config.max_concurrent_trials,
            reuse_actors=True,  # a fresh process for each trial costs seconds
            search_alg=OptunaSearch(seed=config.seed, points_to_evaluate=_start(config, job)),
            scheduler=ASHAScheduler(
                time_attr=STEP,
                max_t=config.num_steps,
                grace_period=config.grace_steps,
                reduction_factor=config.reduction_factor,
            ),
        ),
        run_config=raytune.RunConfig(
            name=name,
            storage_path=parent,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[_Progress(tuple(config.search))],
        ),
    )


def _space(dimension: SearchDimension) -> Any:
    if dimension.choice is not None:
        return raytune.choice(list(dimension.choice))
    if dimension.log_uniform is not None:
        return raytune.loguniform(*dimension.log_uniform)
    assert dimension.uniform is not None
    return raytune.uniform(*dimension.uniform)


def _start(config: TuneConfig, job: Job) -> list[dict[str, Any]]:
    """The base's own values as the first trial, so that the search cannot do worse than them."""
    identity = job.identity
    point: dict[str, Any] = {}
    for key, dimension in config.search.items():
        value = identity.get(key)
        if value is None or not _holds(dimension, value):
            return []
        point[key] = value
    return [point]


def _holds(dimension: SearchDimension, value: Any) -> bool:
    if dimension.choice is not None:
        return value in dimension.choice
    low, high = dimension.log_uniform or dimension.uniform or (value, value)
    return bool(low <= value <= high)


class _Progress(raytune.Callback):  # type: ignore[misc]  # ray is Any to mypy here
    """One line for each report of a trial."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.numbers: dict[str, int] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number = self.numbers.setdefault(trial.trial_id, len(self.numbers) + 1)
        values = ", ".join(f"{_short(key)} {result['config'][key]:.3g}" for key in self.keys)
        progress(
            f"trial {number} · step {result[STEP]} · validation loss "
            f"{result['validation_loss']:.3f} · {values}"
        )


def _trials(config: TuneConfig, grid: raytune.ResultGrid) -> pd.DataFrame:
    """One row a trial, the best first. Raises MantaError if none succeeded."""
    rows = [
        {
            **{key: result.config[key] for key in config.search},
            "steps": int(result.metrics[STEP]),
            trial.METRIC: result.metrics[trial.METRIC],
            "curve": result.metrics_dataframe[[STEP, trial.METRIC]],
        }
        for result in grid
        if result.error is None and result.metrics and STEP in result.metrics
    ]
    if not rows:
        raise MantaError(
            f"no trial of search `{config.name}` succeeded: {_reason(grid)}",
            "the log above has more; started again, the search tries them anew",
        )
    # A trial that was stopped early is no rival of one that ran on: compare the longest first.
    order = ["steps", trial.METRIC]
    table = pd.DataFrame(rows).sort_values(order, ascending=[False, True], ignore_index=True)
    table.index.name = "rank"
    return table


def _reason(grid: raytune.ResultGrid) -> str:
    lines = str(grid.errors[0]).strip().splitlines() if grid.errors else ["no result"]
    return lines[-1]


def _yaml(best: dict[str, Any]) -> bytes:
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in best.items()}
    return yaml.safe_dump(plain, sort_keys=False).encode()


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _print(trials: pd.DataFrame, config: TuneConfig) -> None:
    table = trials.drop(columns="curve").rename(columns=_short)
    progress(table.to_string(float_format=lambda value: f"{value:.4g}"))


def _draw(url: str, trials: pd.DataFrame, config: TuneConfig) -> None:
    """Learning curves, and the loss of each trial against the first searched parameter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2))
    curves, scatter = figure.subplots(1, 2)
    for rank, row in trials.iterrows():
        style = {"lw": 2.5, "color": "black", "zorder": 3} if rank == 0 else {"alpha": 0.6}
        curves.plot(row["curve"][STEP], row["curve"][trial.METRIC], "o-", ms=3, **style)
    curves.set(xlabel="step", ylabel="validation loss (nats a token)", title="best in black")
    key = next(iter(config.search))
    points = scatter.scatter(trials[key], trials[trial.METRIC], c=trials["steps"])
    figure.colorbar(points, label="steps taken")
    logarithmic = config.search[key].log_uniform is not None
    scatter.set(xlabel=_short(key), title=f"search {config.name}")
    scatter.set_xscale("log" if logarithmic else "linear")
    for axes in (curves, scatter):
        axes.grid(alpha=0.3)
    history.write_png(url, figure)
