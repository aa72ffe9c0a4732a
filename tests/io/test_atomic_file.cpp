#include "catch.h"
#include "io/temporary_folder.h"
#include "peft/io/atomic_file.h"
#include "peft/io/staged_directory.h"

#include <string>
#include <string_view>
#include <vector>

#if PEFT_HAS_POSIX_FILES
#include <sys/resource.h>
#include <sys/wait.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/mount.h>
#endif

namespace fs = std::filesystem;
using peft::AtomicFile;
using peft::StagedDirectory;
using peft_test::read_bytes;
using peft_test::TemporaryFolder;
using peft_test::write_bytes;

TEST_CASE("An atomic file appears under its name at the commit", "[atomic_file]") {
  const TemporaryFolder folder;
  AtomicFile file(folder / "a.txt");
  file.write("one ");
  CHECK_FALSE(fs::exists(folder / "a.txt"));
  CHECK(folder.count() == 1);
  file.write("two");
  file.commit();
  CHECK(read_bytes(folder / "a.txt") == "one two");
  CHECK(folder.count() == 1);
  CHECK_THROWS_WITH(file.write("x"), Contains("must not be written after its commit"));
  CHECK_THROWS_WITH(file.commit(), Contains("must not be committed twice"));
}

TEST_CASE("Many parts are written one after the other, empty ones too", "[atomic_file]") {
  const TemporaryFolder folder;
  AtomicFile file(folder / "a.txt");
  file.write("head ");
  std::vector<std::string> texts;
  std::string all = "head ";
  for (int i = 0; i < 2500; ++i) all += texts.emplace_back(i % 7 == 0 ? "" : std::to_string(i) + ",");
  texts.push_back(std::string(300'000, 'x'));
  file.write(std::vector<std::string_view>(texts.begin(), texts.end()));
  file.write(std::vector<std::string_view>());
  file.write(std::vector<std::string_view>{"", {}});
  file.write("tail");
  file.commit();
  CHECK(read_bytes(folder / "a.txt") == all + texts.back() + "tail");
  CHECK_THROWS_WITH(file.write(std::vector<std::string_view>{"x"}), Contains("after its commit"));
}

TEST_CASE("An atomic file without a commit leaves nothing and keeps the older file", "[atomic_file]") {
  const TemporaryFolder folder;
  write_bytes(folder / "a.txt", "old");
  { AtomicFile(folder / "a.txt").write("new"); }
  CHECK(read_bytes(folder / "a.txt") == "old");
  CHECK(folder.count() == 1);
  peft::write_file(folder / "a.txt", "new");
  CHECK(read_bytes(folder / "a.txt") == "new");
}

TEST_CASE("An atomic file names the path and the reason it cannot be written", "[atomic_file]") {
  const TemporaryFolder folder;
  write_bytes(folder / "file", "");
  CHECK_THROWS_WITH(AtomicFile(folder / "none/a.txt"), Contains("none/a.txt': No such file or directory") &&
                                                           Contains("AtomicFile: cannot write"));
  CHECK_THROWS_WITH(AtomicFile(folder / "file/a.txt"), Contains("file/a.txt': Not a directory"));
  CHECK_THROWS_WITH(AtomicFile(folder.path()), Contains("it is a folder"));
  CHECK_THROWS_WITH(AtomicFile(fs::path()), Contains("must name a file"));
}

TEST_CASE("Two atomic files of one name do not disturb each other", "[atomic_file]") {
  const TemporaryFolder folder;
  AtomicFile first(folder / "a.txt"), second(folder / "a.txt");
  first.write("first");
  second.write("second");
  second.commit();
  CHECK(read_bytes(folder / "a.txt") == "second");
  first.commit();
  CHECK(read_bytes(folder / "a.txt") == "first");
  CHECK(folder.count() == 1);
}

#if PEFT_HAS_POSIX_FILES
namespace {

/// A number no running process has, so that its files look abandoned.
pid_t ended_process() {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(0);
  ::waitpid(child, nullptr, 0);
  return child;
}

/// What `body` prints, run in a process of its own whose limits and mounts end with it.
template <class Body>
std::string in_child(const fs::path& report, Body body) {
  const pid_t child = ::fork();
  if (child == 0) {
    std::string text;
    try {
      text = body();
    } catch (const std::exception& error) {
      text = error.what();
    }
    std::ofstream(report) << text;
    ::_exit(0);
  }
  ::waitpid(child, nullptr, 0);
  return read_bytes(report);
}

}  // namespace

TEST_CASE("A file that grows too large is an error and leaves nothing", "[atomic_file]") {
  const TemporaryFolder folder;
  fs::create_directory(folder / "out");
  const auto text = in_child(folder / "report", [&]() -> std::string {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{4096, 4096};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    peft::write_file(folder / "out/a.bin", std::string(100000, 'x'));
    return "written";
  });
  CHECK_THAT(text, Contains("AtomicFile: cannot write '") && Contains("out/a.bin': File too large"));
  CHECK(fs::is_empty(folder / "out"));
}

TEST_CASE("What a killed process left is removed, what a running one writes is not", "[atomic_file]") {
  const TemporaryFolder folder;
  const auto here = "@" + peft::internal::host_name();
  const auto dead = ".a.txt.tmp-" + std::to_string(ended_process()), again = dead + "-1" + here;
  const auto foreign = dead + "@elsewhere";  // whose processes cannot be asked for
  const auto alive = ".a.txt.tmp-" + std::to_string(::getppid()) + here;
  write_bytes(folder / (dead + here), "");
  write_bytes(folder / again, "");
  write_bytes(folder / foreign, "");
  write_bytes(folder / alive, "");
  write_bytes(folder / ".a.txt.tmp-mine", "");
  peft::write_file(folder / "a.txt", "x");
  CHECK_FALSE(fs::exists(folder / (dead + here)));
  CHECK_FALSE(fs::exists(folder / again));
  CHECK(fs::exists(folder / foreign));
  CHECK(fs::exists(folder / alive));
  CHECK(fs::exists(folder / ".a.txt.tmp-mine"));

  fs::create_directories(folder / (".out.tmp-" + std::to_string(ended_process()) + here) / "half");
  const auto before = folder.count();
  StagedDirectory::recover(folder / "out");
  CHECK(folder.count() == before - 1);
}
#endif

#if defined(__linux__)
TEST_CASE("A full disk is named as such and leaves nothing", "[atomic_file]") {
  const TemporaryFolder folder;
  fs::create_directory(folder / "out");
  const auto text = in_child(folder / "report", [&]() -> std::string {
    // A mount of our own: as root, or as root of a user namespace where the system allows one.
    if (::unshare(CLONE_NEWNS) != 0 && ::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return "no mount";
    ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
    if (::mount("tmpfs", (folder / "out").c_str(), "tmpfs", 0, "size=64k") != 0) return "no mount";
    std::string result;
    try {
      peft::write_file(folder / "out/a.bin", std::string(1 << 20, 'x'));
    } catch (const std::exception& error) {
      result = error.what();
    }
    try {
      StagedDirectory staged(folder / "out/b");
      peft::write_file(staged.path() / "a.bin", std::string(1 << 20, 'x'));
      staged.commit();
    } catch (const std::exception& error) {
      result += error.what();
    }
    return result + (fs::is_empty(folder / "out") ? "nothing left" : "something left");
  });
  if (text == "no mount") {
    WARN("this user may not mount a small file system: not tried");
    return;
  }
  CHECK_THAT(text, Contains("out/a.bin': No space left on device (hint: the disk is full"));
  CHECK_THAT(text, Contains("nothing left"));
}
#endif

TEST_CASE("A staged folder appears complete at the commit", "[atomic_file]") {
  const TemporaryFolder folder;
  const bool trailing_slash = GENERATE(false, true);
  StagedDirectory staged(trailing_slash ? folder / "x/y/out/" : folder / "x/y/out");
  CHECK(staged.final_path() == folder / "x/y/out");
  CHECK_THAT(staged.path().filename().string(), Contains(".out.tmp-"));
  write_bytes(staged.path() / "a", "A");
  fs::create_directory(staged.path() / "best");
  write_bytes(staged.path() / "best/b", "B");
  CHECK_FALSE(fs::exists(folder / "x/y/out"));
  staged.commit();
  CHECK(read_bytes(folder / "x/y/out/a") == "A");
  CHECK(read_bytes(folder / "x/y/out/best/b") == "B");
  CHECK(std::distance(fs::directory_iterator(folder / "x/y"), fs::directory_iterator()) == 1);
  CHECK_THROWS_WITH(staged.commit(), Contains("must not be committed twice"));
}

TEST_CASE("A staged folder without a commit leaves nothing, not even the folders above it", "[atomic_file]") {
  const TemporaryFolder folder;
  {
    StagedDirectory staged(folder / "x/y/out");
    write_bytes(staged.path() / "a", "A");
  }
  CHECK(folder.count() == 0);
}

TEST_CASE("A staged folder replaces files only when asked", "[atomic_file]") {
  const TemporaryFolder folder;
  fs::create_directory(folder / "out");
  SECTION("an empty folder is taken") {
    StagedDirectory staged(folder / "out");
    write_bytes(staged.path() / "a", "A");
    staged.commit();
    CHECK(read_bytes(folder / "out/a") == "A");
  }
  SECTION("files are kept") {
    write_bytes(folder / "out/old", "old");
    CHECK_THROWS_WITH(StagedDirectory(folder / "out"),
                      Contains("must be empty or not exist, but it has files"));
    CHECK(read_bytes(folder / "out/old") == "old");
  }
  SECTION("files that appear meanwhile are kept") {
    StagedDirectory staged(folder / "out");
    write_bytes(folder / "out/old", "old");
    CHECK_THROWS_WITH(staged.commit(), Contains("must be empty or not exist, but it has files"));
    CHECK(read_bytes(folder / "out/old") == "old");
  }
  SECTION("or overwritten") {
    write_bytes(folder / "out/old", "old");
    StagedDirectory staged(folder / "out", /*overwrite=*/true);
    write_bytes(staged.path() / "a", "A");
    CHECK(fs::exists(folder / "out/old"));
    staged.commit();
    CHECK(read_bytes(folder / "out/a") == "A");
    CHECK_FALSE(fs::exists(folder / "out/old"));
  }
  CHECK(folder.count() == 1);
}

TEST_CASE("A staged folder refuses a file's name", "[atomic_file]") {
  const TemporaryFolder folder;
  write_bytes(folder / "out", "");
  CHECK_THROWS_WITH(StagedDirectory(folder / "out", true), Contains("must be a folder or not exist"));
  CHECK_THROWS_WITH(StagedDirectory(folder / "out/sub"), Contains("out/sub': ") && Contains("cannot write"));
  CHECK_THROWS_WITH(StagedDirectory(fs::path()), Contains("must name a folder"));
  CHECK(folder.count() == 1);
}

TEST_CASE("A link stays a link and its target is replaced", "[atomic_file]") {
  const TemporaryFolder folder;
  fs::create_directory(folder / "real");
  fs::create_directory_symlink(folder / "real", folder / "out");
  StagedDirectory staged(folder / "out");
  write_bytes(staged.path() / "a", "A");
  staged.commit();
  CHECK(fs::is_symlink(folder / "out"));
  CHECK(read_bytes(folder / "real/a") == "A");
}

TEST_CASE("A folder set aside by an interrupted commit is put back", "[atomic_file]") {
  const TemporaryFolder folder;
  fs::create_directory(folder / ".out.peft-old");
  write_bytes(folder / ".out.peft-old/a", "A");
  StagedDirectory::recover(folder / "out");
  CHECK(read_bytes(folder / "out/a") == "A");
  fs::create_directory(folder / ".out.peft-old");
  StagedDirectory::recover(folder / "out");
  CHECK(read_bytes(folder / "out/a") == "A");
  CHECK(folder.count() == 1);
}
