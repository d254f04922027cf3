// Stands in for Apple's header in tools/macos/check.py: what metal-cpp names of it, and nothing else.
#pragma once
typedef struct CGColorSpace* CGColorSpaceRef;
