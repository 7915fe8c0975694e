/* A slow or failing disk, by LD_PRELOAD: each fdatasync and fsync first looks into the file that SLOW_SYNC_FILE names.
   It holds "MILLISECONDS [ERRNO]": the call takes that much longer, and fails with that number if one is given. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static int disturbed(void) {
    const char *path = getenv("SLOW_SYNC_FILE");
    char text[64] = "";
    int ms = 0, number = 0, file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0 || sscanf(text, "%d %d", &ms, &number) < 1) return 0;
    struct timespec left = {ms / 1000, ms % 1000 * 1000000L};
    while (ms > 0 && nanosleep(&left, &left) == -1 && errno == EINTR) {}
    return number;
}

static int sync_with(const char *name, int fd) {
    int number = disturbed();
    if (number) {
        errno = number;
        return -1;
    }
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(fd);
}

int fdatasync(int fd) { return sync_with("fdatasync", fd); }
int fsync(int fd) { return sync_with("fsync", fd); }
