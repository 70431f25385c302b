//! The `raid10` command.

fn main() -> std::process::ExitCode {
    raid::cli::main()
}
