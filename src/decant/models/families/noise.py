"""What a scheduler of diffusers says about training: the noise schedule, and what the network predicts."""

from typing import Any, cast, get_args

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from decant.errors import refuse
from decant.maths.prediction import Prediction
from decant.maths.schedules import Schedule, variance_preserving


def noise_of(scheduler: Any) -> tuple[Prediction, Schedule]:
    """Prediction type and schedule of a scheduler with betas.

    Every sampler of diffusers holds `alphas_cumprod` as it computed them itself, also those rescaled to zero terminal
    SNR; of one that holds none the config gives them.

    Raises:
        UserError: when the scheduler is of another kind, such as flow matching.
    """
    config = scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in get_args(Prediction) or "beta_schedule" not in config:
        raise refuse(
            "scheduler",
            f"{type(scheduler).__name__}, prediction {prediction!r}",
            allowed="a scheduler with betas, and prediction epsilon, v_prediction or sample",
            hint="this family has DDPM's noise schedule; flow matching and EDM belong to other families",
        )
    own = getattr(scheduler, "alphas_cumprod", None)
    table = own if isinstance(own, Tensor) else DDPMScheduler.from_config(config).alphas_cumprod
    return cast(Prediction, prediction), variance_preserving(table)
