"""OpenVision 2 g/14: 84 and 224 px in one run; arguments: openvision2_curriculum.py."""

import functools

from apps.configs import openvision2_curriculum

get_config = functools.partial(openvision2_curriculum.get_config, model="g/14")
