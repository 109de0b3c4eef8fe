"""Building a model's engine ahead, in a worker that serves nobody: everything else of the activation is for later."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from aios_edge.bundle.read import open_bundle
from aios_edge.errors import BundleRefused, RequestError, RuntimeUnavailable
from aios_edge.golden import read_golden
from aios_edge.profile import DeviceProfile
from device_agent.activation import Activated, Record
from device_agent.activation_golden import run_samples
from device_agent.activation_raw import NoTask
from device_agent.raw_model import digested, raw_bundle
from device_agent.runtime import open_runtime
from device_agent.wire import RawModel


def build_engine(
    root: Path,
    raw: RawModel | None,
    profile: DeviceProfile,
    *,
    state_dir: Path | None,
    bundle_id: str | None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Activated:
    """Open a bundle, or a ``raw`` model, so that its engine is built and kept; ``engine`` of the report says how.

    Raises :class:`ActivationRefused` for a bundle that is damaged or was replaced.
    """
    record = Record(on_stage)
    try:
        record.stage("bundle")
        bundle = open_bundle(root) if raw is None else digested(raw_bundle(root, raw.name, raw.version))
        record.bundle = bundle
        if (meant := bundle_id if raw is None else raw.digest) not in (None, bundle.bundle_id):
            raise BundleRefused("replaced", f"is not the one that was meant ({meant})", where=str(root))
        record.stage("engine")
        started_at = time.perf_counter()
        record.runtime = runtime = open_runtime(bundle, profile, state_dir=state_dir, engines="build")
        record.load_s = time.perf_counter() - started_at
        if raw is None and runtime.engine is not None and runtime.engine.state == "built":
            record.stage("engine_run")  # a first answer, so that an engine that can't run is no engine
            run_samples(runtime, read_golden(bundle.file(bundle.contract.golden.file)), range(1))
        runtime.keep_engine()
    except BundleRefused as error:
        raise record.refused(error) from error
    except (RequestError, RuntimeUnavailable) as error:
        raise record.refused(BundleRefused(record.current, error.what, where=str(root))) from error
    return Activated(runtime=runtime, task=NoTask(), bundle=bundle, report=record.report(alone=True), raw=True)
