"""MLflow: a data base beside the workdir, unless MLFLOW_TRACKING_URI names a server.

MLFLOW_EXPERIMENT_NAME and the variables of its servers work as ever.
"""

import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from deit_jax.errors import UserError
from deit_jax.storage import LockedError, backend
from deit_jax.workdir.trackers import base

TAG = "deit_jax.run"  # by which a run is found again
DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
_STATUS = {base.FINISHED: "FINISHED", base.STOPPED: "KILLED", base.FAILED: "FAILED"}
_PARAMS, _LENGTH = 100, 6000  # MLflow's limits: of a call, of a value
_MAKING_S = 60.0  # for which a run waits while another one makes the data base


class Tracker(base.Tracker):
    """A run of MLflow whose tag is our id."""

    def __init__(self, run: base.Followed):
        super().__init__(run)
        from mlflow.tracking import MlflowClient

        for library in ("mlflow", "alembic"):  # which tell how a data base is made
            logging.getLogger(library).setLevel(logging.ERROR)
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            if run.folder is None:
                raise UserError(f"{run.workdir}: is on no disk; set MLFLOW_TRACKING_URI")
            database = run.folder.parent / DATABASE
            artifacts = (run.folder.parent / ARTIFACTS).as_uri()
            _make_database(database, artifacts)
            uri = f"sqlite:///{database}"
        self._client = MlflowClient(tracking_uri=uri)
        self._id = self._found_or_made(artifacts)
        self._tell_fields(run.fields)
        self._client.update_run(self._id, status="RUNNING")

    def _found_or_made(self, artifacts: str | None) -> str:
        experiment = self._experiment(artifacts)
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{self.run.id}'")
        if found:
            return found[0].info.run_id
        tags = {TAG: self.run.id, "deit_jax.workdir": str(self.run.workdir)}
        return self._client.create_run(experiment, run_name=self.run.name, tags=tags).info.run_id

    def _experiment(self, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", base.PROJECT)
        if (there := self._client.get_experiment_by_name(name)) is None:
            try:
                return self._client.create_experiment(name, artifact_location=artifacts)
            except MlflowException:  # another run has made it meanwhile
                if (there := self._client.get_experiment_by_name(name)) is None:
                    raise
        return there.experiment_id

    def _tell_fields(self, fields: dict[str, Any]) -> None:
        """Add the fields that are not told yet: MLflow's parameters cannot change."""
        from mlflow.entities import Param

        known = self._client.get_run(self._id).data.params
        new = [Param(k, str(v)[:_LENGTH]) for k, v in fields.items() if k not in known]
        for i in range(0, len(new), _PARAMS):
            self._client.log_batch(self._id, params=new[i : i + _PARAMS])

    def key(self, name: str) -> str:
        """Return a name, as that of a class, in the letters that MLflow allows."""
        return re.sub(r"[^\w./ -]", "_", name)

    def last(self) -> dict[str, int]:
        """Return the step of each metric's last point."""
        metrics = self._client.get_run(self._id).data.to_proto().metrics
        return {metric.key: metric.step for metric in metrics}

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each metric."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = [Metric(k, float(v), now, step) for k, v in values.items()]
        self._client.log_batch(self._id, metrics=points)

    def close(self, status: str) -> None:
        """Tell how the run ended."""
        self._client.set_terminated(self._id, _STATUS[status])


def _make_database(path: Path, artifacts: str) -> None:
    """Make MLflow's data base unless it is there, whole or not at all.

    Half of its tables, as a kill would leave them, MLflow neither completes nor replaces.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    disk, deadline = backend(path), time.monotonic() + _MAKING_S
    while not disk.exists(path):
        try:
            with disk.lock(path.with_name(f"{path.name}.lock"), "deit train"):
                if disk.exists(path):
                    return
                temporary = path.with_name(f"{path.name}.tmp")
                disk.remove(temporary)
                store = SqlAlchemyStore(f"sqlite:///{temporary}", artifacts)
                store.engine.dispose()
                disk.rename(temporary, path)
        except LockedError:
            if time.monotonic() > deadline:
                raise UserError(f"{path}: another run is making it, and has not ended") from None
            time.sleep(0.2)
