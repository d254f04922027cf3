// See device.h beside this file.
#pragma once

namespace mlx::core::metal {

bool is_available();

}  // namespace mlx::core::metal
