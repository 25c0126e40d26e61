// Declared once the kernels stand.
#pragma once
