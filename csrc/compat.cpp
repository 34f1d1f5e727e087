// Symbols that newer toolchains would take from the system's libraries, defined here, so that the wheel loads wherever
// glibc 2.28 and its contemporary libstdc++ are.
#include <sstream>

// Since GCC 9, not in libstdc++ before it.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

// Since glibc 2.32; shared_ptr reads it to do without atomics. "May have threads" is always a right answer.
extern "C" {
char __libc_single_threaded = 0;
}
