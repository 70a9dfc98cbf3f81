// What both simulated worlds of the tests have in common beside `peers.h`: a clock, settings, and the journal.
#pragma once
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include <string>

namespace simulated {

// Seconds of CLOCK_MONOTONIC, which is Python's time.monotonic.
inline double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

// The value of the environment variable SIMULATED_<name>.
inline const char* setting(const char* name, const char* otherwise) {
  const char* value = getenv((std::string("SIMULATED_") + name).c_str());
  return value && *value ? value : otherwise;
}

// Appends a line to the file $SIMULATED_JOURNAL, which all ranks of a job share.
inline void journal(const std::string& text) {
  static const int file =
      open(setting("JOURNAL", "/dev/null"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  char stamp[64];
  snprintf(stamp, sizeof stamp, "%.6f %d ", now(), (int)getpid());
  std::string line = stamp + text + "\n";
  (void)!write(file, line.data(), line.size());
}

// One pause of a poll that began at `since`: short at first, longer later.
inline void nap(double since) { usleep(now() - since < 0.02 ? 200 : 1000); }

}  // namespace simulated
