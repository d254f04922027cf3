// Stands in for Apple's header in tools/macos/check.py: what metal-cpp names of it, and nothing else.
#pragma once
#include <stddef.h>
typedef double CFTimeInterval;
typedef const void* CFTypeRef;
typedef const struct __CFString* CFStringRef;
