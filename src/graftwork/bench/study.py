"""The runs in an optuna study: several machines work on one bench through a data base that all of them reach.

Each run is a trial that was put into the study's queue. optuna hands every trial to one worker, keeps its heartbeat, and lets
another one have it again when that stops. No sampler chooses anything. Where the data base locks no rows (SQLite), two workers may
get one trial in the same instant: the later one notices, here or when it is told that the trial is finished, and lets it be.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..core.errors import GraftError
from .runs import DONE, FAILED, RUNNING, WAITING, Row, Run
from .store import TRIES, check_same

RUN, WORKER, RESULT, SETTINGS = "run", "worker", "result", "settings"


class Study:
    """A store in a study. lease: seconds for which a trial holds without a heartbeat."""

    def __init__(self, url: str, name: str, lease: float) -> None:
        try:
            import optuna
        except ImportError as error:
            do = "pip install 'graftwork[study]'"
            raise GraftError("a bench on several machines (--storage)", "optuna is not installed", do) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")  # it is kept by `renew`
        self.optuna, self.url = optuna, url
        again = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=TRIES - 1)
        try:
            self.storage = optuna.storages.RDBStorage(
                url,
                heartbeat_interval=max(1, int(lease / 4)),
                grace_period=max(2, int(lease)),
                heartbeat_stale_trial_callback=again,
            )
            self.study = optuna.create_study(storage=self.storage, study_name=name, load_if_exists=True)
        except Exception as error:  # every data base has errors of its own
            found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise GraftError(
                f"the bench in {url!r}", found, "give the URL of a data base that can be reached"
            ) from error
        self.claimed: dict[Run, Any] = {}

    def agree(self, identity: Mapping[str, Any]) -> None:
        """Write down what decides the results, or GraftError where the study was begun with something else."""
        there = self.study.user_attrs.get(SETTINGS)
        if there is None:
            self.study.set_user_attr(SETTINGS, dict(identity))
        else:
            check_same(self.study.study_name, there, identity)

    def add(self, runs: Sequence[Run]) -> None:
        """Put runs into the queue. Two machines may add one at the same moment: `claim` passes over the second."""
        there = {row.run for row in self.rows()} if runs else set()
        for run in runs:
            if run not in there:
                self.study.enqueue_trial({}, user_attrs={RUN: run.key})

    def claim(self, worker: str, tasks: Collection[str]) -> Run | None:
        """Take the next run; those whose holder has gone are put into the queue again first. One of another task is put back."""
        states = self.optuna.trial.TrialState
        self.optuna.storages.fail_stale_trials(self.study)
        while self.study.get_trials(deepcopy=False, states=(states.WAITING,)):
            trial = self.study.ask()
            key = trial.user_attrs.get(RUN)
            if key is None:  # another worker took the last one in between
                self.study.tell(trial, state=states.PRUNED)
                return None
            if any(
                other.user_attrs.get(RUN) == key and other.number < trial.number
                for other in self.study.get_trials(deepcopy=False, states=(states.RUNNING, states.COMPLETE))
            ):
                self.study.tell(trial, state=states.PRUNED)
                continue
            if not self._ours(trial, worker):
                continue
            run = Run.from_key(key)
            self.claimed[run] = trial
            if run.task not in tasks:
                self.release(run, worker)
                return None
            self.renew(run, worker)
            return run
        return None

    def _ours(self, trial: Any, worker: str) -> bool:
        try:
            trial.set_user_attr(WORKER, worker)
        except self.optuna.exceptions.UpdateFinishedTrialError:
            return False
        return bool(self.storage.get_trial(trial._trial_id).user_attrs.get(WORKER) == worker)

    def renew(self, run: Run, worker: str) -> bool:
        """A heartbeat. False where the trial was taken for dead."""
        trial = self.claimed[run]
        self.storage.record_heartbeat(trial._trial_id)
        return bool(self.storage.get_trial(trial._trial_id).state == self.optuna.trial.TrialState.RUNNING)

    def finish(self, run: Run, worker: str, result: Mapping[str, Any]) -> None:
        """Write what came of a run. A failure is a result too: the trial is complete."""
        trial = self.claimed.pop(run)
        try:
            trial.set_user_attr(RESULT, json.dumps(result))
            self.study.tell(trial, float(result.get("score", 0.0)))
        except (self.optuna.exceptions.UpdateFinishedTrialError, ValueError):
            return  # somebody else had it too, or it was taken for dead: the first result stands

    def release(self, run: Run, worker: str) -> None:
        """Give a claimed run back: a trial of its own, the old one counts for nothing."""
        trial = self.claimed.pop(run)
        self.study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
        self.study.enqueue_trial({}, user_attrs={RUN: run.key})

    def rows(self) -> list[Row]:
        """Every run once, in the order in which they were added."""
        out: dict[Run, Row] = {}
        states = self.optuna.trial.TrialState
        known = {states.WAITING: WAITING, states.RUNNING: RUNNING, states.COMPLETE: DONE, states.FAIL: FAILED}
        for trial in self.study.get_trials(deepcopy=False):
            key, state = trial.user_attrs.get(RUN), known.get(trial.state)
            if key is None or state is None:
                continue
            result = json.loads(trial.user_attrs.get(RESULT, "{}"))
            if state == FAILED:
                result = {"reason": f"killed {TRIES} times, or its machine went away"}
            elif "reason" in result:
                state = FAILED
            run = Run.from_key(key)
            if run not in out or out[run].state == FAILED or state == DONE:  # a later try stands for an earlier one
                out[run] = Row(run, state, result)
        return list(out.values())
