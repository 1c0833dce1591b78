"""Full-size counts of the published students and of their multiply-accumulates, on the meta device."""

import pytest

from decant.models.cost import macs, parameters
from decant.models.load import architecture
from decant.models.surgery.presets import Student, published
from decant.models.surgery.surgery import build, skeleton

TEACHERS = {"sd15": 859_520_964, "sd21": 865_910_724, "musetalk": 849_947_844, "sdxl": 2_567_463_684}

# Published with BK-SDM and BK-SDM v2, except for MuseTalk's, which diffusers gives for the same cut.
STUDENTS: list[tuple[str, Student, int]] = [
    ("sd15", "bk-base", 579_384_964),
    ("sd15", "bk-small", 482_346_884),
    ("sd15", "bk-tiny", 323_384_964),
    ("sd21", "bk-base", 583_480_964),
    ("sd21", "bk-small", 485_787_524),
    ("sd21", "bk-tiny", 326_825_604),
    ("musetalk", "bk-base", 573_252_484),
    ("musetalk", "bk-small", 477_197_444),
    ("musetalk", "bk-tiny", 318_235_524),
    ("sd15", "sd-small", 579_384_964),
    ("sd15", "sd-tiny", 323_384_964),
    ("sd15", "bk-sdm-small", 482_346_884),
    ("sd21", "bk-sdm-v2-base", 583_480_964),
    ("sd21", "bk-sdm-v2-small", 485_787_524),
    ("sd21", "bk-sdm-v2-tiny", 326_825_604),
    ("sd15", "slim-65m", 64_669_444),
    ("sdxl", "ssd-1b", 1_331_334_404),
    ("sdxl", "vega", 745_225_604),
    ("sdxl", "koala-1b", 1_161_184_324),
    ("sdxl", "koala-700m", 782_822_724),
]

GMACS: list[tuple[Student | None, float]] = [
    (None, 401.6),
    ("bk-base", 261.5),
    ("bk-small", 255.4),
    ("bk-tiny", 242.8),
]


@pytest.mark.parametrize(("name", "count"), TEACHERS.items())
def test_teacher_has_its_published_parameters(name: str, count: int) -> None:
    assert parameters(skeleton(architecture(name))) == count


@pytest.mark.parametrize(("name", "student", "count"), STUDENTS)
def test_student_has_its_published_parameters(name: str, student: Student, count: int) -> None:
    teacher = skeleton(architecture(name))
    surgery = published(teacher.config, teacher.state_dict(), student)
    assert sum(weight.numel() for weight in surgery.weights.values()) == count
    assert all(weight.is_meta for weight in surgery.weights.values())
    assert parameters(build(surgery)) == count


@pytest.mark.parametrize(("student", "gmacs"), GMACS)
def test_macs_at_512_px_include_attention(student: Student | None, gmacs: float) -> None:
    teacher = skeleton(architecture("sd15"))
    unet = build(published(teacher.config, teacher.state_dict(), student)) if student else teacher
    assert macs(unet, (4, 64, 64), tokens=77) / 1e9 == pytest.approx(gmacs, abs=0.1)


@pytest.mark.parametrize(("student", "gmacs"), [(None, 88.9), ("bk-base", 58.5), ("bk-small", 57.0), ("bk-tiny", 53.8)])
def test_macs_of_musetalk_read_fifty_tokens(student: Student | None, gmacs: float) -> None:
    teacher = skeleton(architecture("musetalk"))
    unet = build(published(teacher.config, teacher.state_dict(), student)) if student else teacher
    assert macs(unet, (8, 32, 32), tokens=50) / 1e9 == pytest.approx(gmacs, abs=0.1)
