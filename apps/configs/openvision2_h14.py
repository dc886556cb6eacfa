"""OpenVision 2 H/14: 84, 224 and 336 px in one run; arguments: openvision2_curriculum.py."""

import functools

from apps.configs import openvision2_curriculum

get_config = functools.partial(openvision2_curriculum.get_config, model="H/14")
