"""The root of the configuration."""

from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cluster.errors import ConfigError
from cluster.settings.capture import (
    AuditSettings,
    CalibrationSettings,
    ErasureSettings,
    ImplicitSettings,
    IntakeSettings,
    LogSettings,
    RewardSettings,
    SealSettings,
)
from cluster.settings.curation import CurationSettings
from cluster.settings.engines import EngineSettings, GraderSettings
from cluster.settings.evaluation import EvaluationSettings
from cluster.settings.experiments import ExperimentSettings, RolloutSettings
from cluster.settings.export import ExportSettings
from cluster.settings.finetuning import FinetuningSettings
from cluster.settings.labelling import LabellingSettings
from cluster.settings.learning import (
    AutomationSettings,
    CaptureSettings,
    FeedbackSettings,
    LearningSettings,
    TrajectoryEvaluationSettings,
    TrajectoryLoopSettings,
)
from cluster.settings.outlets import NotificationSettings, OutletSettings
from cluster.settings.runtime import (
    DatabaseSettings,
    LoggingSettings,
    MetricsSettings,
    MLflowSettings,
    RaySettings,
    StorageSettings,
)
from cluster.settings.serving import ServeSettings, ShadowSettings
from cluster.settings.tools import ToolSettings
from cluster.settings.training import SweepSettings, TrainingSettings


class Settings(BaseSettings):
    """All of `rayloop.yaml`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="RAYLOOP_",
        env_nested_delimiter="__",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    home: Path = Path(".rayloop")
    """Where the embedded defaults keep everything: database, MLflow, datasets, logs."""
    tenant: str = Field("default", pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Isolation boundary that commands act in."""
    workspace: str = Field("default", pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Subdivision of a tenant that commands act in."""
    database: DatabaseSettings = DatabaseSettings()
    storage: StorageSettings = StorageSettings()
    mlflow: MLflowSettings = MLflowSettings()
    ray: RaySettings = RaySettings()
    logging: LoggingSettings = LoggingSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()
    seal: SealSettings = SealSettings()
    erasure: ErasureSettings = ErasureSettings()
    intake: IntakeSettings = IntakeSettings()
    rewards: RewardSettings = RewardSettings()
    implicit: ImplicitSettings = ImplicitSettings()
    audit: AuditSettings = AuditSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    learning: LearningSettings = LearningSettings()
    capture: CaptureSettings = CaptureSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    trajectory_evaluation: TrajectoryEvaluationSettings = TrajectoryEvaluationSettings()
    trajectory_feedback_loop: TrajectoryLoopSettings = TrajectoryLoopSettings()
    automation: AutomationSettings = AutomationSettings()
    curation: CurationSettings = CurationSettings()
    training: TrainingSettings = TrainingSettings()
    finetuning: FinetuningSettings = FinetuningSettings()
    sweep: SweepSettings = SweepSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    export: ExportSettings = ExportSettings()
    serve: ServeSettings = ServeSettings()
    shadow: ShadowSettings = ShadowSettings()
    engine: EngineSettings = EngineSettings()
    grader: GraderSettings = GraderSettings()
    tools: ToolSettings = ToolSettings()
    labelling: LabellingSettings = LabellingSettings()
    experiment: ExperimentSettings = ExperimentSettings()
    rollout: RolloutSettings = RolloutSettings()
    notifications: NotificationSettings = NotificationSettings()
    outlets: OutletSettings = OutletSettings()

    @model_validator(mode="after")
    def _home_is_absolute(self) -> "Settings":
        object.__setattr__(self, "home", self.home.expanduser().resolve())
        return self

    @model_validator(mode="after")
    def _wins_have_opponents(self) -> "Settings":
        chosen = self.experiment
        named = {"primary": (chosen.primary,), "further_primaries": chosen.further_primaries}
        for field, metrics in (named | {"guardrails": chosen.guardrails}).items():
            if "win_rate" in metrics and not self.shadow.enabled:
                rule = "needs shadow answers to be compared with"
                raise ConfigError(f"experiment.{field}", "win_rate", rule, "set `shadow.enabled: true`")
        return self

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL in force."""
        return self.database.url or f"sqlite:///{self.home / 'rayloop.db'}"

    @property
    def tracking_uri(self) -> str:
        """The MLflow tracking URI in force."""
        return self.mlflow.tracking_uri or f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def datasets_root(self) -> str:
        """Folder or `pyarrow.fs` URI that holds the datasets."""
        return self.storage.datasets or str(self.home / "datasets")

    @property
    def files_root(self) -> Path:
        """Folder that holds uploaded files; every process that trains must see it."""
        return Path(self.storage.files).expanduser().resolve() if self.storage.files else self.home / "files"

    @property
    def archetypes_root(self) -> Path:
        """Folder that holds the rules and monthly reports of archetypes."""
        return self.home / "archetypes"

    @property
    def events_root(self) -> str:
        """Folder or `pyarrow.fs` URI that holds the sealed days of the log."""
        return self.storage.events or str(self.home / "events")
