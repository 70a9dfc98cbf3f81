/* A slow disk, by LD_PRELOAD: what is written below the folder SLOW_DISK takes its time, SLOW_DISK_RATE bytes a second.
 *
 * All writers (Python, libstdc++ for torch, Rust for safetensors) call these functions. Each call writes a part
 * and says so, as write(2) may: the callers go on with the rest. Reading, renaming and everything else is as fast as ever.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PART 4096

static double rate(int fd) {
    const char *folder = getenv("SLOW_DISK"), *bytes = getenv("SLOW_DISK_RATE");
    char link[64], path[4096];
    if (!folder || !bytes || fd < 3)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) ? 0 : atof(bytes);
}

static size_t slowly(int fd, size_t count) {
    int before = errno;
    double bytes_a_second = rate(fd);
    if (bytes_a_second > 0 && count > 0) {
        if (count > PART)
            count = PART;
        double seconds = count / bytes_a_second;
        struct timespec left = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
        while (nanosleep(&left, &left) && errno == EINTR) {
        }
    }
    errno = before;
    return count;
}

ssize_t write(int fd, const void *buffer, size_t count) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real)
        real = dlsym(RTLD_NEXT, "write");
    return real(fd, buffer, slowly(fd, count));
}

ssize_t pwrite64(int fd, const void *buffer, size_t count, off64_t offset) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real)
        real = dlsym(RTLD_NEXT, "pwrite64");
    return real(fd, buffer, slowly(fd, count), offset);
}

ssize_t pwrite(int fd, const void *buffer, size_t count, off_t offset) {
    return pwrite64(fd, buffer, count, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    static ssize_t (*real)(int, const struct iovec *, int);
    if (!real)
        real = dlsym(RTLD_NEXT, "writev");
    if (rate(fd) > 0)
        for (int i = 0; i < count; i++)
            if (parts[i].iov_len)
                return write(fd, parts[i].iov_base, parts[i].iov_len);
    return real(fd, parts, count);
}
