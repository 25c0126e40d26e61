# find_package(amct_ext): the target amct_ext::amct_ext. Torch comes from find_package(Torch) or from the consumer's own
# include and link settings; it is not repeated here, because torch's package file asks for every toolkit it was built with.
include("${CMAKE_CURRENT_LIST_DIR}/amct_ext-targets.cmake")
