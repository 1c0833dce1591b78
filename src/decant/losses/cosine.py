"""How far two tensors point apart, one number per sample, computed in float32."""

from torch import Tensor
from torch.nn.functional import cosine_similarity


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - the cosine between the channels at every place, mean over the places: ``(B,)``.

    ``(B, C, H, W)`` has its channels on the second axis, ``(B, L, C)`` on the last. 0 where both point the same way
    whatever their lengths, 2 where they are opposite.
    """
    assert prediction.shape == target.shape, f"{tuple(prediction.shape)} against {tuple(target.shape)}"
    axis = 1 if prediction.ndim == 4 else -1
    return 1 - cosine_similarity(prediction.float(), target.float(), dim=axis, eps=1e-8).flatten(1).mean(1)
