// Marks the functions that the library exports; all others are hidden.
#pragma once

#define AMCT_API __attribute__((visibility("default")))
