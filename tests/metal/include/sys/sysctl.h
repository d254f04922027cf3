// macOS's header, which eval_metal.cpp asks for the version of the system; fake_device.cpp answers.
#pragma once

#include <cstddef>

int sysctlbyname(const char* name, void* value, size_t* bytes, void* new_value, size_t new_bytes);
