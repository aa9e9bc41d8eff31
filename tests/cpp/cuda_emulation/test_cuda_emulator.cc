#include <gtest/gtest.h>
#include "cuda_emulator.h"
TEST(Emulator, Placeholder) {}
