"""What all assets share: a stage of the chain, and the runner that makes it, reuses it or leaves everything as it was.

A stage is a function from `Work` to the metrics its op returned:

    @stage(config=CurateConfig, parents=("source_images",), group="data", kinds={"python"})
    def curated_dataset(work: Work) -> dict[str, Any]:
        return curate(work.config, work.inputs["source_images"], work.out, work.progress, ...)

An asset is a version. Its key is the digest of the op's sources, the libraries' versions, the resolved configuration, the
taxonomy, the parents, the base weights and what else the stage says it depends on. Where the store already holds that key
the version is reused; otherwise the op fills an empty folder which becomes a version only when it is complete. Assets hand
each other an `ArtifactRef` in their materialization.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import dagster as dg
import onnxruntime
import pydantic
import torch

from assets.display import describe
from assets.refs import HOST, HOST_TAG, artifacts_metadata, parent_refs, pinned
from assets.settings import Settings, resolve
from assets.sources import ROOT, code_version
from infra.data import weights, weights_digest
from infra.disk import no_space
from infra.progress import Progress
from infra.stores.base import ArtifactRef, ArtifactStore, Version
from infra.workspace import Workspace
from models.config import OpConfig
from models.errors import DiskFull, InputsChanged, UnknownVersion
from models.taxonomy import Taxonomy
from ops.gate import SIGNATURE
from ops.lineage import RELEASE
from ops.promote import STAGES

OWNER = "team:editing"
GPU_POOL = "gpu"
DATA_VERSION = "dagster/data_version"  # Dagster's tag of a materialization
Events = Iterator[dg.MaterializeResult | dg.AssetMaterialization]
LIBRARIES = ("numpy", "torch", "diffusers", "transformers", "peft")  # where draws and numbers come from besides our own code
# and where what is measured of edits comes from: pictures, measures, intervals, the reader's network, the signs' font
MEASURES = ("pillow", "scikit-image", "scipy", "rapidocr", "matplotlib")


@dataclass(frozen=True)
class Work:
    """Everything a stage's function may use. `inputs` are the parents' folders by artifact name; `out` is empty and to be filled."""

    stage: Stage
    config: Any
    settings: Settings
    workspace: Workspace
    store: ArtifactStore
    taxonomy: Taxonomy
    progress: Progress
    refs: dict[str, ArtifactRef]
    out: Path
    scratch: Path
    run_id: str
    mode: str | None = None  # the partition, for `policy`
    pin: Callable[[str], ArtifactRef | None] = lambda stage: None  # the release a stage pointed to when the run began

    @property
    def artifact(self) -> str:
        """Name under which the store keeps what is made."""
        return f"{self.stage.name}-{self.mode}" if self.mode else self.stage.name

    @cached_property
    def inputs(self) -> dict[str, Path]:
        return {name: self.store.get(ref) for name, ref in self.refs.items()}

    @property
    def flux(self) -> Path:
        """The base pipeline's folder."""
        return weights(self.settings.flux, ROOT)

    @property
    def judge(self) -> Path:
        """The base judge's folder."""
        return weights(self.settings.judge, ROOT)

    @property
    def pipeline(self) -> Path:
        """The pipeline to sample or to start from: that of the release which the stage uses, else the base's."""
        return self.inputs[RELEASE] / "model" if RELEASE in self.inputs else self.flux

    def release(self, policy: str) -> ArtifactRef | None:
        """The release a policy named in a config stands for: none for `base`, what a stage points to, or the one of that digest.

        Raises UnknownVersion for a stage that points nowhere and for an unknown digest.
        """
        if policy == "base":
            return None
        ref = self.pin(policy) if policy in STAGES else self.store.version(policy).ref
        if ref is None or ref.name != RELEASE:
            raise UnknownVersion(
                f"No release is {policy!r}.", "Promote one first (`onereward run`), name a release's digest, or use `base`."
            )
        return ref


@dataclass(frozen=True)
class Stage:
    """One stage of the chain; `build` makes its Dagster asset."""

    name: str
    work: Callable[[Work], dict[str, Any]]
    config: type[OpConfig]
    parents: tuple[str, ...]
    group: str
    kinds: set[str]
    models: tuple[str, ...] = ()  # base weights it reads: "flux", "judge"
    gpu: bool = False
    modes: tuple[str, ...] = ()  # partitions
    libraries: tuple[str, ...] = ()  # distributions that its result comes from, besides LIBRARIES
    depends: Callable[[Work], dict[str, str]] | None = None  # what else the result depends on, for the key
    uses: Callable[[Work], ArtifactRef | None] | None = None  # an earlier release it is made with; becomes a parent
    standing: Callable[[Work], ArtifactRef | None] | None = None  # a version that makes the work needless
    finish: Callable[[Work, Made], dict[str, Any]] | None = None  # what follows once the version is stored; gives metadata
    signed: bool = False  # whether its versions carry a signature

    @property
    def artifacts(self) -> tuple[str, ...]:
        """Names under which the store keeps what the stage makes."""
        return tuple(f"{self.name}-{mode}" for mode in self.modes) or (self.name,)

    @property
    def file(self) -> Path:
        return Path(inspect.getfile(self.work))

    @property
    def partitions(self) -> dg.PartitionsDefinition | None:
        return dg.StaticPartitionsDefinition(list(self.modes)) if self.modes else None

    def run_config(self, settings: Settings) -> type[dg.Config]:
        """The op's configuration as Dagster's, with the preset's values as defaults: the launchpad shows what will run."""
        resolved = resolve(settings, self.name, self.config)
        fields: dict[str, Any] = {
            name: (info.annotation, pydantic.fields.FieldInfo.merge_field_infos(info, default=getattr(resolved, name)))
            for name, info in self.config.model_fields.items()
        }
        return pydantic.create_model(f"{self.name}_run", __base__=(self.config, dg.Config), **fields)  # type: ignore[arg-type]

    def build(self, settings: Settings) -> dg.AssetsDefinition:
        """The Dagster asset of this stage under a preset."""

        def compute(context: dg.AssetExecutionContext, config: Any) -> Events:
            chosen = self.config(**{name: getattr(config, name) for name in self.config.model_fields})
            yield from _materialize(self, settings, context, chosen)

        compute.__annotations__ = {"context": dg.AssetExecutionContext, "config": self.run_config(settings), "return": Events}
        return dg.asset(
            name=self.name,
            deps=[dg.AssetKey(parent) for parent in self.parents],
            group_name=self.group,
            kinds=self.kinds,
            owners=[OWNER],
            description=inspect.getdoc(self.work),
            tags={"device": "gpu" if self.gpu else "cpu"},
            code_version=code_version(self.file),
            pool=GPU_POOL if self.gpu else None,
            partitions_def=self.partitions,
            backfill_policy=dg.BackfillPolicy.single_run() if self.modes else None,
        )(compute)


def reader_versions(work: Work) -> dict[str, str]:
    """For a stage's key: what the word reader runs in. Either comes as one of several distributions."""
    return {"onnxruntime": onnxruntime.__version__, "opencv": cv2.__version__}


def stage(**attributes: Any) -> Callable[[Callable[[Work], dict[str, Any]]], Stage]:
    """Make a function a `Stage` of its own name; the docstring becomes the asset's description."""

    def wrap(work: Callable[[Work], dict[str, Any]]) -> Stage:
        return Stage(name=work.__name__, work=work, **attributes)

    return wrap


@dataclass(frozen=True)
class Made:
    """What one run of a stage gave: a version, new or reused, and the seconds its op took."""

    version: Version
    folder: Path
    reused: bool
    seconds: float


def work_key(work: Work) -> str:
    """The key under which the result is stored: equal keys mean the work is already done.

    Device and number of threads move the last bits of sums; they are no inputs, else a version made on one machine would be
    worth nothing on another.
    """
    parts = {
        "code": code_version(work.stage.file),
        "libraries": {name: importlib.metadata.version(name) for name in (*LIBRARIES, *work.stage.libraries)},
        "config": work.config.digest(),
        "taxonomy": work.taxonomy.digest(),
        "mode": work.mode,
        "parents": {name: ref.digest for name, ref in work.refs.items()},
        "weights": {kind: weights_digest(getattr(work, kind), work.workspace.home / "weights.json") for kind in work.stage.models},
        "depends": work.stage.depends(work) if work.stage.depends else {},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def _empty_folder(tmp: Path) -> Iterator[Path]:
    """A folder to fill; gone afterwards, whatever happened."""
    folder = Path(tempfile.mkdtemp(dir=tmp))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make(work: Work) -> Made:
    """Reuse the version with this key, or let the op make it. A failure or Ctrl-C leaves the store as it was.

    Raises DiskFull when the op meets a full disk, InputsChanged when its key is another one afterwards, and whatever the op raises.
    """
    name = work.artifact
    if work.stage.uses and (release := work.stage.uses(work)):
        work = replace(work, refs={**work.refs, release.name: release})
    if work.stage.standing and (ref := work.stage.standing(work)):
        stands = work.store.version(ref.digest)
        work.progress.say(f"nothing to do: {name} v{stands.number} ({ref.digest[:8]}) stands")
        return Made(stands, work.store.get(ref), reused=True, seconds=0.0)
    key = work_key(work)
    if known := work.store.find(name, key):
        work.progress.say(f"reused {name} v{known.number} ({known.ref.digest[:8]})")
        return Made(known, work.store.get(known.ref), reused=True, seconds=0.0)
    scratch = work.workspace.scratch(key)
    with _empty_folder(work.workspace.tmp) as out:
        start = time.monotonic()
        try:
            metrics = work.stage.work(replace(work, out=out, scratch=scratch))
        except DiskFull:
            raise
        except Exception as error:
            if no_space(error):
                raise DiskFull(f"No space left in {work.workspace.home} while making {name}.", "Free some space and run again.") from error
            raise
        seconds = time.monotonic() - start
        if work_key(work) != key:  # the op may have read either state: under neither key would it be known which
            raise InputsChanged(f"What {name} is made from (labels, pictures, weights) changed meanwhile.", "Run again.")
        ref = work.store.put(
            name,
            out,
            key=key,
            parents=tuple(work.refs.values()),
            run_id=work.run_id,
            code_version=code_version(work.stage.file),
            config={"preset": work.settings.preset, "taxonomy": work.taxonomy.digest(), **work.config.model_dump(mode="json")},
            metadata={
                **{name: value for name, value in metrics.items() if isinstance(value, str | int | float)},
                "seconds": round(seconds, 2),
                **({SIGNATURE: work.workspace.keys.sign_folder(out)} if work.stage.signed else {}),
            },
            progress=work.progress,
        )
    shutil.rmtree(scratch, ignore_errors=True)
    version = work.store.version(ref.digest)
    work.progress.say(f"made {name} v{version.number} ({ref.digest[:8]}) in {seconds:.1f} s")
    return Made(version, work.store.get(ref), reused=False, seconds=seconds)


def _materialize(stage: Stage, settings: Settings, context: dg.AssetExecutionContext, config: OpConfig) -> Events:
    """Run a stage for Dagster: parents from this run's or the latest materializations, progress to the run's log."""
    torch.set_num_threads(settings.threads)
    context.instance.add_run_tags(context.run_id, {HOST_TAG: HOST})
    workspace = Workspace.from_env()
    work = Work(
        stage=stage,
        config=config,
        settings=settings,
        workspace=workspace,
        store=workspace.store,
        taxonomy=Taxonomy.load(ROOT / settings.taxonomy if settings.taxonomy else None),
        progress=Progress(context.log.info),
        refs=parent_refs(context, workspace.store, workspace.keys, stage.parents),
        out=workspace.home,
        scratch=workspace.home,
        run_id=context.run_id,
        pin=pinned(context, workspace.store).get,
    )
    if stage.modes and not context.has_partition_key:
        yield from _materialize_modes(work, context)
        return
    if stage.modes:
        work = replace(work, mode=context.partition_key)
    made = make(work)
    finished = stage.finish(work, made) if stage.finish else {}
    yield dg.MaterializeResult(metadata={**_metadata(work, made), **finished}, data_version=dg.DataVersion(made.version.ref.digest))


def _materialize_modes(work: Work, context: dg.AssetExecutionContext) -> Events:
    """Several partitions in one step. Dagster gives them one data version, so each gets an event of its own after that, with its digest."""
    name, modes = work.stage.name, context.partition_keys if context.has_partition_key_range else work.stage.modes
    works = [replace(work, mode=mode) for mode in modes]
    results = [make(each) for each in works]
    refs = [made.version.ref for made in results]
    combined = hashlib.sha256("".join(ref.digest for ref in refs).encode()).hexdigest()
    yield dg.MaterializeResult(metadata=artifacts_metadata({ref.name: ref for ref in refs}), data_version=dg.DataVersion(combined))
    common = context.instance.fetch_materializations(dg.AssetKey(name), limit=1).records[0].asset_materialization
    for each, made in zip(works, results, strict=True):
        tags = {**(common.tags or {}), DATA_VERSION: made.version.ref.digest} if common else {}
        yield dg.AssetMaterialization(name, partition=each.mode, metadata=_metadata(each, made), tags=tags)


def _metadata(work: Work, made: Made) -> dict[str, Any]:
    name = work.artifact
    return {
        **artifacts_metadata({name: made.version.ref}),
        "name": name,
        "digest": made.version.ref.digest,
        "version": made.version.number,
        "size": made.version.ref.size,
        "uri": made.version.ref.uri,
        "reused": made.reused,
        "seconds": round(made.seconds, 2),
        **describe(made.folder),
    }
